"""The global order of rows: a pure function from a slot to a row, and its inverse.

A slot is a number of rows consumed, over all ranks and epochs; it is the whole state of the data path. An epoch
permutes the shards, forms pools of consecutive shards of that order, and permutes the rows of each pool. So a reader
touches the files of one pool at a time, and a shard's rows come in random order among those of its pool.

Invariants: every row comes exactly once an epoch. Nothing depends on ranks, batches or the machine: arithmetic is on
integers, without a library's random numbers. Results are frozen: the logs of finished runs are replayed through this
file, so a change of any result needs a new ORDER_VERSION. Golden vectors in tests/data/test_order.py hold it.

Costs: one epoch's layout is two arrays of the number of shards (15,000 shards: some milliseconds); no array of the
number of rows exists. A row costs some 0.2 us in a large array.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import isqrt
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lit_gpt.cli import BadInput

Ints = NDArray[np.int64]

ORDER_VERSION = 1
POOL_SHARDS = 64
"""Shards a pool; a node's cache holds about two pools."""
MIXTURE_PERIOD = 4096
"""Slots in which each source of a mixture has exactly its share."""
_ROUNDS = 8
"""Rounds of the Feistel cipher. With 6, permutations of 5 to 7 elements are biased by a few percent (chi-square test
over 20,000 keys); with 8 the test finds no bias."""
_CHUNK = 1 << 15
"""Indices encrypted at a time, few enough for their temporaries to stay in a core's cache."""
_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MULTIPLY_1 = 0xBF58476D1CE4E5B9
_MULTIPLY_2 = 0x94D049BB133111EB
_SHARDS, _ROWS, _MIXTURE = 1, 2, 3
"""What a key is used for: no two permutations share a key."""


def derive_key(*parts: int) -> int:
    """A 64-bit hash of the integers `parts` (splitmix64's finaliser, chained)."""
    key = 0
    for part in parts:
        key = (key ^ (part & _MASK)) + _GOLDEN & _MASK
        key = (key ^ key >> 30) * _MULTIPLY_1 & _MASK
        key = (key ^ key >> 27) * _MULTIPLY_2 & _MASK
        key ^= key >> 31
    return key


class Permutation:
    """A keyed bijection of range(size): a Feistel cipher over an a x b grid just above size, with cycle walking.

    The grid has at most size + sqrt(size) cells, so that walking back into range(size) is rare.
    """

    def __init__(self, size: int, key: int) -> None:
        self.size = size
        self._height = isqrt(max(size - 1, 0)) + 1
        self._width = -(-size // self._height)
        self._keys = [np.uint64(derive_key(key, number)) for number in range(_ROUNDS)]

    def forward(self, index: Ints) -> Ints:
        return self._walk(index, range(_ROUNDS), np.add)

    def inverse(self, index: Ints) -> Ints:
        return self._walk(index, range(_ROUNDS - 1, -1, -1), np.subtract)

    def _walk(self, index: Ints, rounds: range, combine: np.ufunc) -> Ints:
        cells = index.astype(np.uint64)
        for start in range(0, len(cells), _CHUNK):
            chunk = cells[start : start + _CHUNK]
            chunk[:] = self._encrypt(chunk, rounds, combine)
            while (outside := np.flatnonzero(chunk >= self.size)).size:
                chunk[outside] = self._encrypt(chunk[outside], rounds, combine)
        return cells.view(np.int64)

    def _encrypt(self, cells: NDArray[np.uint64], rounds: range, combine: np.ufunc) -> NDArray[np.uint64]:
        top = cells // np.uint64(self._width)
        side = cells - top * np.uint64(self._width)
        for number in rounds:
            if number % 2 == 0:
                _round(top, side, self._keys[number], self._height, combine)
            else:
                _round(side, top, self._keys[number], self._width, combine)
        top *= np.uint64(self._width)
        top += side
        return top


def _round(
    half: NDArray[np.uint64], other: NDArray[np.uint64], key: np.uint64, modulus: int, combine: np.ufunc
) -> None:
    """One round in place: half = half +- hash(other) modulo `modulus`, all in wrapping 64-bit arithmetic."""
    mixed = other + key
    mixed *= np.uint64(_MULTIPLY_1)
    mixed ^= mixed >> np.uint64(32)
    mixed *= np.uint64(_MULTIPLY_2)
    mixed >>= np.uint64(32)
    mixed *= np.uint64(modulus)
    mixed >>= np.uint64(32)  # a fraction of 32 bits times the modulus: a number below it, without a division
    combine(half, mixed, out=half)
    # A sum leaves the range by at most one modulus; a difference below zero wraps to near 2**64.
    correction = np.uint64(modulus) if combine is np.add else np.uint64(_MASK + 1 - modulus)
    half -= correction * (half >= np.uint64(modulus))


class EpochRows(NamedTuple):
    """The rows that one source shows at some of its slots: parallel arrays of the slots' shape."""

    epoch: Ints
    shard: Ints
    row: Ints


class _Layout(NamedTuple):
    """One epoch's order of the shards."""

    shards: Ints
    """Shard at each position."""
    starts: Ints
    """First row, counted over the whole epoch, of each position; the last entry is the epoch's rows."""
    pool_starts: Ints
    """The same for pools."""


class Order:
    """The order of one source: slot -> (epoch, shard, row) and back."""

    def __init__(
        self, shard_rows: Sequence[int] | Ints, seed: int, pool_shards: int = POOL_SHARDS, stream: int = 0
    ) -> None:
        """stream: the source's number in a mixture, so that sources of equal shape have different orders."""
        self.shard_rows = np.asarray(shard_rows, dtype=np.int64)
        self.rows_per_epoch = int(self.shard_rows.sum())
        if self.rows_per_epoch == 0:
            raise BadInput("the data has no rows: it needs at least one document of two tokens")
        self.pool_shards = pool_shards
        self._key = derive_key(seed, stream)
        self._layouts: dict[int, _Layout] = {}

    def locate(self, slots: ArrayLike) -> EpochRows:
        """Epoch, shard and row of each slot."""
        asked = np.asarray(slots, dtype=np.int64)
        epochs, offsets = np.divmod(asked.reshape(-1), self.rows_per_epoch)
        shards = np.empty_like(offsets)
        for epoch in np.unique(epochs):
            layout, chosen = self._layout(int(epoch)), np.flatnonzero(epochs == epoch)
            pools = np.searchsorted(layout.pool_starts, offsets[chosen], side="right") - 1
            for pool in np.unique(pools):
                inside, start = chosen[pools == pool], layout.pool_starts[pool]
                offsets[inside] = start + self._pool(layout, int(epoch), int(pool)).forward(offsets[inside] - start)
            positions = np.searchsorted(layout.starts, offsets[chosen], side="right") - 1
            shards[chosen] = layout.shards[positions]
            offsets[chosen] -= layout.starts[positions]
        return EpochRows(*(array.reshape(asked.shape) for array in (epochs, shards, offsets)))

    def slot_of(self, epoch: int, shard: ArrayLike, row: ArrayLike) -> Ints:
        """The slots that show these rows of a shard in `epoch`: the inverse of locate."""
        layout = self._layout(epoch)
        positions = np.empty_like(layout.shards)
        positions[layout.shards] = np.arange(len(positions))
        position, within = np.broadcast_arrays(positions[np.asarray(shard)], np.asarray(row, dtype=np.int64))
        offsets = (layout.starts[position] + within).reshape(-1)
        pools = position.reshape(-1) // self.pool_shards
        for pool in np.unique(pools):
            inside, start = np.flatnonzero(pools == pool), layout.pool_starts[pool]
            offsets[inside] = start + self._pool(layout, epoch, int(pool)).inverse(offsets[inside] - start)
        return (epoch * self.rows_per_epoch + offsets).reshape(position.shape)

    def pools(self, slot: int, count: int) -> list[Ints]:
        """The shards of `count` pools, from the pool of `slot` on."""
        epoch, offset = divmod(slot, self.rows_per_epoch)
        pool = int(np.searchsorted(self._layout(epoch).pool_starts, offset, side="right")) - 1
        found: list[Ints] = []
        while len(found) < count:
            shards = self._layout(epoch).shards[pool * self.pool_shards : (pool + 1) * self.pool_shards]
            if not len(shards):
                epoch, pool = epoch + 1, 0
                continue
            found.append(shards)
            pool += 1
        return found

    def _pool(self, layout: _Layout, epoch: int, pool: int) -> Permutation:
        size = int(layout.pool_starts[pool + 1] - layout.pool_starts[pool])
        return Permutation(size, derive_key(self._key, _ROWS, epoch, pool))

    def _layout(self, epoch: int) -> _Layout:
        if epoch not in self._layouts:
            count = len(self.shard_rows)
            shards = Permutation(count, derive_key(self._key, _SHARDS, epoch)).forward(np.arange(count))
            starts = np.concatenate([[0], np.cumsum(self.shard_rows[shards])])
            edges = np.append(np.arange(0, count, self.pool_shards), count)
            if len(self._layouts) > 1:  # a step straddles at most two epochs
                self._layouts.pop(next(iter(self._layouts)))
            self._layouts[epoch] = _Layout(shards, starts, starts[edges])
        return self._layouts[epoch]


class Mixture:
    """Slots shared out among weighted sources: slot -> (source, the source's own slot) and back.

    In every period of MIXTURE_PERIOD slots each source has its exact count, at positions that are permuted for that
    period. A source's own slots come in order, so that the mixture ends with the last row of one source.
    """

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        self.counts = np.asarray(_shares(weights), dtype=np.int64)
        self._starts = np.concatenate([[0], np.cumsum(self.counts)])
        self._key = derive_key(seed, _MIXTURE)

    def locate(self, slots: ArrayLike) -> tuple[Ints, Ints]:
        """Source of each slot, and which of the source's slots it is."""
        asked = np.asarray(slots, dtype=np.int64)
        if len(self.counts) == 1:
            return np.zeros_like(asked), asked
        periods, offsets = np.divmod(asked.reshape(-1), MIXTURE_PERIOD)
        for period in np.unique(periods):
            inside = np.flatnonzero(periods == period)
            ranks = np.empty(MIXTURE_PERIOD, dtype=np.int64)
            ranks[self._positions(int(period))] = np.arange(MIXTURE_PERIOD)
            offsets[inside] = ranks[offsets[inside]]
        sources = np.searchsorted(self._starts, offsets, side="right") - 1
        own = periods * self.counts[sources] + offsets - self._starts[sources]
        return sources.reshape(asked.shape), own.reshape(asked.shape)

    def slot_of(self, source: int, own_slots: ArrayLike) -> Ints:
        """The slots at which `source` shows its own slots."""
        asked = np.asarray(own_slots, dtype=np.int64)
        if len(self.counts) == 1:
            return asked
        periods, ranks = np.divmod(asked.reshape(-1), self.counts[source])
        slots = periods * MIXTURE_PERIOD
        for period in np.unique(periods):
            inside = np.flatnonzero(periods == period)
            slots[inside] += self._positions(int(period))[self._starts[source] + ranks[inside]]
        return slots.reshape(asked.shape)

    def consumed(self, slot: int) -> list[int]:
        """Each source's own slots before `slot`."""
        if len(self.counts) == 1:
            return [slot]
        period, offset = divmod(slot, MIXTURE_PERIOD)
        mine = np.split(self._positions(period), self._starts[1:-1])
        return [period * len(positions) + int((positions < offset).sum()) for positions in mine]

    def slots_within(self, limits: Sequence[int]) -> int:
        """Slots before the first that would need more than `limits[source]` of some source's own slots."""
        return min(int(self.slot_of(source, limit)) for source, limit in enumerate(limits))

    def _positions(self, period: int) -> Ints:
        """Positions in the period: those of source 0, ascending, then those of source 1, and so on."""
        cells = Permutation(MIXTURE_PERIOD, derive_key(self._key, period)).forward(np.arange(MIXTURE_PERIOD))
        return np.argsort(np.searchsorted(self._starts, cells, side="right"), kind="stable")


def _shares(weights: Sequence[float]) -> list[int]:
    """Slots of each source in a period, which sum to MIXTURE_PERIOD: the weights rounded by largest remainders."""
    if not weights or min(weights) <= 0:
        raise BadInput(f"weights of the data sources {list(weights)}: each must be above 0")
    exact = [Fraction(weight) * MIXTURE_PERIOD / sum(map(Fraction, weights)) for weight in weights]
    counts = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda source: (counts[source] - exact[source], source))
    for source in by_remainder[: MIXTURE_PERIOD - sum(counts)]:
        counts[source] += 1
    if 0 in counts:
        smallest = sum(weights) / MIXTURE_PERIOD
        raise BadInput(f"weight {weights[counts.index(0)]} of a data source is below {smallest:g}, one row in 4096")
    return counts
