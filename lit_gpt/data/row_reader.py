"""Rows of tokens by slot: the global order says which row a slot shows, the packing where it lies in its shard.

A shard of 15 tokens with documents a, b and c, read by `window` with block_size = 6. A row reads block_size + 1 tokens,
the last of which is also the first of the next row. The shard's last row is padded (.).

    tokens          a0 a1 a2 a3 a4 b0 b1 b2 c0 c1 c2 c3 c4 c5 c6
    document_ends                  5        8                    15
    row 0 reads     a0 a1 a2 a3 a4 b0 b1
    row 1 reads                       b1 b2 c0 c1 c2 c3 c4
    row 2 reads                                         c4 c5 c6

                    row 0             row 1             row 2
    inputs          a0 a1 a2 a3 a4 b0 b1 b2 c0 c1 c2 c3 c4 c5  .  .  .  .
    targets         a1 a2 a3 a4  - b1 b2  - c1 c2 c3 c4 c5 c6  -  -  -  -
    segments        [------------] [] [---] [---------] [---] [---------]
    cu_seqlens      0              5  6     8           12    14          18

A row's last token is a target only. Where a document ends the target is IGNORE_INDEX (-), as on padding. A segment is a
document's part of a row, or padding; cu_seqlens says where segments start in the flattened rows, then their end.
`bestfit` and `pad` (packing.py) make a row of several such runs of tokens, or of one.

Invariants: a slot's row depends on the data sets, the seed, block_size and the packing only. Every token id is checked
against the vocabulary. The digest of a set of rows is the sum modulo 2**64 of xxh3_64(tokens as stored, seed = slot):
it does not depend on how the rows were shared out, and changes with any token, row or slot. No row is ever skipped or
replaced.
Costs: opening reads the manifests (`window`). A row costs one pread, one hash and two copies: some 10 us for 2,048
tokens; what open shards cost is said in open_shards.py. No torch, so that a query about a finished run starts at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash
from numpy.typing import ArrayLike, NDArray

from lit_gpt.cli import BadInput
from lit_gpt.config import IGNORE_INDEX
from lit_gpt.data.open_shards import OpenShard, OpenShards
from lit_gpt.data.order import ORDER_VERSION, POOL_SHARDS, Ints, Mixture, Order
from lit_gpt.data.packing import PACKING_VERSION, PACKINGS, Spans
from lit_gpt.data.shard_cache import ShardCache, StagedFile
from lit_gpt.data.token_store import DamagedShard, ShardFile, TokenStore

_DIGEST_MASK = (1 << 64) - 1


class SourceRows(NamedTuple):
    """The rows of some slots: parallel arrays, one entry a slot."""

    source: Ints
    epoch: Ints
    shard: Ints
    row: Ints


class Filled(NamedTuple):
    """What `fill` returns beside the tokens and targets."""

    cu_seqlens: Ints
    """Where segments start in the flattened rows, ascending, each once, then the end of the last row."""
    digest: int


class RowReader:
    """The rows of one or more token stores, in their global order. Used by one thread at a time."""

    def __init__(
        self,
        stores: TokenStore | Sequence[TokenStore],
        block_size: int,
        seed: int,
        *,
        weights: Sequence[float] | None = None,
        packing: str = "window",
        cross_document_attention: bool = False,
        max_epochs: int = 1,
        cache: ShardCache | None = None,
        index_dir: Path | None = None,
    ) -> None:
        """weights: of the sources; None: each weighs as many as it has rows. index_dir: where `bestfit` and `pad` keep
        their index; None: in the store's own folder.
        """
        stores = [stores] if isinstance(stores, TokenStore) else stores
        _check_settings(stores, block_size, seed, packing, max_epochs)
        self.stores = tuple(stores)
        self.block_size = block_size
        self.packing = packing
        self.cross_document_attention = cross_document_attention
        self.shards = OpenShards(stores, block_size, packing, cache, index_dir)
        self.orders = [Order(self.shards.rows(number), seed, stream=number) for number in range(len(stores))]
        self.mixture = Mixture(weights or [order.rows_per_epoch for order in self.orders], seed)
        self.dtype = stores[0].dtype
        self.padding_id = stores[0].eos_id or 0
        self._seed = seed
        self.rows_per_epoch = self.mixture.slots_within([order.rows_per_epoch for order in self.orders])
        """Rows until the first of the sources has been seen once."""
        self.total_rows = self.rows_within(max_epochs)
        """Rows until the first of the sources has been seen max_epochs times."""

    def slot_facts(self) -> dict[str, Any]:
        """What decides which row a slot shows, as JSON; the datapoint log refuses to go on with other values."""
        return {
            "datasets": [store.dataset_id for store in self.stores],
            "mixture": self.mixture.counts.tolist(),
            "seed": self._seed,
            "block_size": self.block_size,
            "packing": self.packing,
            "packing_version": PACKING_VERSION,
            "order_version": ORDER_VERSION,
            "pool_shards": POOL_SHARDS,
        }

    def rows_within(self, epochs: int) -> int:
        """Rows until the first of the sources has been seen `epochs` times."""
        return self.mixture.slots_within([epochs * order.rows_per_epoch for order in self.orders])

    def epochs(self, slot: int) -> tuple[float, ...]:
        """How often each source has been seen when `slot` rows are consumed."""
        own = self.mixture.consumed(slot)
        return tuple(slots / order.rows_per_epoch for slots, order in zip(own, self.orders, strict=True))

    def locate(self, slots: ArrayLike) -> SourceRows:
        """Source, epoch, shard and row of each slot."""
        sources, own = self.mixture.locate(np.atleast_1d(slots))
        epoch, shard, row = (np.empty_like(own) for _ in range(3))
        for source in np.unique(sources):
            chosen = sources == source
            epoch[chosen], shard[chosen], row[chosen] = self.orders[source].locate(own[chosen])
        return SourceRows(sources, epoch, shard, row)

    def fill(self, slots: Ints, tokens: NDArray[Any], targets: NDArray[np.int32], *, digest: bool = True) -> Filled:
        """Read the rows of `slots` into tokens and targets, both (rows, block_size); a slot below 0 gives padding."""
        tokens[slots < 0] = self.padding_id
        targets[slots < 0] = IGNORE_INDEX
        real = np.flatnonzero(slots >= 0)
        located = self.locate(slots[real])
        if self.shards.staging and len(real):
            self._stage_ahead(int(slots[real].min()))
        cu_seqlens, total = [np.arange(len(slots) + 1) * self.block_size], 0
        for source, number, group in _by_shard(located):
            lines, rows = real[group], located.row[group]

            def fill_lines(
                source: int = source, number: int = number, lines: Ints = lines, rows: Ints = rows
            ) -> tuple[Ints, int]:
                shard = self.shards.get(source, number)
                laid = _lay(shard.packing.spans(rows), lines)
                summed = _copy(shard.file, laid, slots if digest else None, tokens, targets)
                return self._mark(shard, laid, lines, tokens, targets), summed

            found, summed = self.shards.with_retries(fill_lines, source, number)
            cu_seqlens.append(found)
            total += summed
        self._check_ids(slots, tokens, targets)
        return Filled(np.unique(np.concatenate(cu_seqlens)), total & _DIGEST_MASK)

    def _mark(
        self, shard: OpenShard, laid: Laid, lines: Ints, tokens: NDArray[Any], targets: NDArray[np.int32]
    ) -> Ints:
        """Pad the lines, mask targets at the documents' ends; returns their entries of cu_seqlens, in no order."""
        width = self.block_size
        used = np.bincount(laid.line, weights=laid.inputs, minlength=len(tokens))[lines].astype(np.int64)
        for line, length in zip(lines[used < width].tolist(), used[used < width].tolist(), strict=True):
            tokens[line, length:] = self.padding_id
            targets[line, length:] = IGNORE_INDEX
        padding_starts, span_starts = lines * width + used, laid.line * width + laid.at
        if self.cross_document_attention and self.packing == "window":
            return padding_starts
        keys = [token.astype(shard.document_ends.dtype) for token in (laid.start, laid.start + laid.inputs)]
        first, last = (np.searchsorted(shard.document_ends, key, side="right") for key in keys)
        count = last - first
        which = np.repeat(np.arange(len(count)), count)
        nth = np.arange(len(which)) - np.repeat(np.cumsum(count) - count, count)
        document_ends = span_starts[which] + shard.document_ends[first[which] + nth] - laid.start[which]
        targets.reshape(-1)[document_ends - 1] = IGNORE_INDEX
        return np.concatenate([padding_starts, span_starts, document_ends])

    def _check_ids(self, slots: Ints, tokens: NDArray[Any], targets: NDArray[np.int32]) -> None:
        """Refuse ids outside the vocabulary before they reach a device, where they would be an unreadable crash."""
        vocab_size = self.stores[0].vocab_size
        if not len(slots) or max(int(tokens.max()), int(targets.max())) < vocab_size:
            return
        line = int(np.flatnonzero((tokens >= vocab_size).any(1) | (targets >= vocab_size).any(1))[0])
        located = self.locate(slots[line : line + 1])
        shard = self.shards.get(int(located.source[0]), int(located.shard[0]))
        for start, stop in zip(*shard.packing.spans(located.row)[1::2], strict=True):
            ids = shard.file.read(int(start), int(stop))
            if (foreign := np.flatnonzero(ids >= vocab_size)).size:
                raise DamagedShard(
                    f"{shard.file.path}: id {ids[foreign[0]]} at token {start + foreign[0]}, vocabulary of {vocab_size}"
                )
        raise DamagedShard(f"{shard.file.path}: ids outside the vocabulary that were gone when read again")

    def _stage_ahead(self, slot: int) -> None:
        """Ask the cache for the shards of the pool of `slot`, then for those of the next pool."""
        own = self.mixture.consumed(slot)
        pools = [order.pools(next_slot, 2) for next_slot, order in zip(own, self.orders, strict=True)]
        self.shards.stage(
            [(source, int(number)) for ahead in (0, 1) for source, both in enumerate(pools) for number in both[ahead]]
        )

    def close(self) -> None:
        """Close every shard."""
        self.shards.close()


def open_sources(names: Sequence[str]) -> tuple[list[TokenStore], list[float] | None]:
    """Stores and weights of settings such as `DIR`, or `DIR:WEIGHT` of several; no weights where none is given."""
    stores, weights = [], []
    for name in names:
        folder, colon, weight = name.rpartition(":")
        if not colon or Path(name).is_dir():
            folder, weight = name, ""
        stores.append(TokenStore.open(folder))
        try:
            weights += [float(weight)] if weight else []
        except ValueError:
            raise BadInput(f"data source {name!r}: {weight!r} is no weight; give DIR or DIR:WEIGHT") from None
    if weights and len(weights) < len(stores):
        raise BadInput(f"data sources {', '.join(names)}: give a weight to each of them, or to none")
    return stores, weights or None


class Laid(NamedTuple):
    """Spans of one shard and where they lie in the batch: parallel arrays."""

    line: Ints
    """Row of the batch."""
    at: Ints
    """Index of the span's first input in its line."""
    start: Ints
    inputs: Ints
    stop: Ints


def _by_shard(found: SourceRows) -> Iterator[tuple[int, int, Ints]]:
    """(source, shard, which of the rows lie there), each shard once."""
    keys = found.source * (1 << 32) + found.shard
    order = np.argsort(keys, kind="stable")
    for group in np.split(order, np.flatnonzero(np.diff(keys[order])) + 1):
        if len(group):
            yield int(found.source[group[0]]), int(found.shard[group[0]]), group


def _lay(spans: Spans, lines: Ints) -> Laid:
    """Lay the spans of each row one after the other in its line."""
    before = np.cumsum(spans.inputs) - spans.inputs
    at = before - before[np.searchsorted(spans.row, spans.row)]
    return Laid(lines[spans.row], at, spans.start, spans.inputs, spans.stop)


def _copy(
    file: ShardFile | StagedFile, laid: Laid, slots: Ints | None, tokens: NDArray[Any], targets: NDArray[np.int32]
) -> int:
    """Read each span into its line; the sum of the rows' hashes, each seeded with its slot (0 where slots is None)."""
    total, last_line = 0, -1
    pieces: list[NDArray[Any]] = []
    for line, at, start, inputs, stop in zip(*(array.tolist() for array in laid), strict=True):
        ids = file.read(start, stop)
        tokens[line, at : at + inputs] = ids[:inputs]
        targets[line, at : at + stop - start - 1] = ids[1:]
        if slots is None:
            continue
        if line != last_line and pieces:
            total += _hash(pieces, int(slots[last_line]))
            pieces = []
        pieces.append(ids)
        last_line = line
    return total + (_hash(pieces, int(slots[last_line])) if slots is not None and pieces else 0)


def _hash(pieces: list[NDArray[Any]], slot: int) -> int:
    """xxh3 of a row's tokens, in one call: a streaming hash would cost twice as much."""
    row = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
    return xxhash.xxh3_64_intdigest(row.data, slot)


def _check_settings(stores: Sequence[TokenStore], block_size: int, seed: int, packing: str, max_epochs: int) -> None:
    if packing not in PACKINGS:
        raise BadInput(f"packing={packing!r}: valid are {', '.join(PACKINGS)}")
    for name, value in (("block_size", block_size), ("max_epochs", max_epochs)):
        if value < 1:
            raise BadInput(f"{name}={value}: must be at least 1")
    if not 0 <= seed < 1 << 64:
        raise BadInput(f"seed={seed}: must be from 0 to 2**64 - 1")
    for store in stores:
        if store.vocabulary != stores[0].vocabulary:
            raise BadInput(f"{store.path} and {stores[0].path} were prepared with different tokenizers: mix one only")
