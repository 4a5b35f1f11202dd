"""How rows are cut from the documents of one shard: `window`, `bestfit` or `pad`.

window   cuts the shard every block_size tokens, wherever documents end. Neighbouring rows share one token. Only the
         shard's last row is padded. Every token but the shard's first is the target, masked or not, of exactly one row.
bestfit  keeps a document whole if it fits into a row. A longer one is cut into full rows and a rest; all pieces are
         packed best-fit decreasing: the longest first, each into the fullest row that has room.
pad      one document, or one piece of a longer one, a row; the rest is padding. For comparison only.

Invariants: in `bestfit` and `pad` every token is the input of exactly one row; a piece's last target is the next token
of its document, unless the document ends there. The rows of a shard depend on its document ends and block_size only.
Costs: `window` stores nothing; the others hold about 8 bytes a piece, and best fit packs some 2 M documents a second.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

PACKINGS = ("window", "bestfit", "pad")
PACKING_VERSION = 1


class Spans(NamedTuple):
    """Runs of consecutive tokens that make up rows: parallel arrays, ordered by row and by place in the row."""

    row: Ints
    """Index into the rows that were asked for."""
    start: Ints
    """First token in the shard."""
    inputs: Ints
    """Tokens that the model reads."""
    stop: Ints
    """End of the tokens to read: one more than the inputs, as the last target, if the document goes on."""


class Packing(Protocol):
    """The rows of one shard."""

    @property
    def rows(self) -> int: ...

    def spans(self, rows: Ints) -> Spans:
        """The runs of tokens that these rows are made of."""
        ...

    def rows_between(self, start: int, stop: int) -> Spans:
        """The rows whose inputs overlap tokens [start, stop), by their number in the shard; each with the overlap."""
        ...


class Window:
    """Rows of block_size inputs, one after the other."""

    def __init__(self, tokens: int, block_size: int) -> None:
        self.tokens = tokens
        self.block_size = block_size
        self.rows = window_rows(tokens, block_size)

    def spans(self, rows: Ints) -> Spans:
        start = rows * self.block_size
        inputs = np.minimum(self.block_size, self.tokens - 1 - start)
        return Spans(np.arange(len(rows)), start, inputs, start + inputs + 1)

    def rows_between(self, start: int, stop: int) -> Spans:
        # The shard's very last token is a target but never an input.
        last = min(stop, self.tokens - 1)
        rows = np.arange(start // self.block_size, -(-last // self.block_size))
        begin = np.maximum(rows * self.block_size, start)
        end = np.minimum((rows + 1) * self.block_size, last)
        return Spans(rows, begin, end - begin, end)


def window_rows(tokens: int, block_size: int) -> int:
    """Rows that `window` cuts from a shard: enough for every token but the first to be a target."""
    return max(0, -(-(tokens - 1) // block_size))


class Pieces:
    """Rows of whole documents and of pieces of long ones (`bestfit`, `pad`)."""

    def __init__(self, first: Ints, start: Ints, inputs: Ints, stop: Ints) -> None:
        """Pieces in order of row; those of row r are first[r] to first[r + 1]."""
        self.first, self.start, self.inputs, self.stop = first, start, inputs, stop
        self.rows = len(first) - 1

    def spans(self, rows: Ints) -> Spans:
        count = self.first[rows + 1] - self.first[rows]
        row = np.repeat(np.arange(len(rows)), count)
        nth = np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)
        piece = self.first[rows][row] + nth
        return Spans(row, self.start[piece], self.inputs[piece], self.stop[piece])

    def rows_between(self, start: int, stop: int) -> Spans:
        piece = np.flatnonzero((self.start < stop) & (self.start + self.inputs > start))
        piece = piece[np.argsort(self.start[piece])]
        begin = np.maximum(self.start[piece], start)
        end = np.minimum(self.start[piece] + self.inputs[piece], stop)
        return Spans(np.searchsorted(self.first, piece, side="right") - 1, begin, end - begin, end)


def pack(document_ends: NDArray[np.integer], block_size: int, packing: str) -> Pieces:
    """The rows of a shard whose documents end at `document_ends`, for `bestfit` or `pad`."""
    document_starts = np.concatenate([[0], document_ends[:-1]]).astype(np.int64)
    count = -(-(document_ends - document_starts) // block_size)
    document = np.repeat(np.arange(len(document_ends)), count)
    nth = np.arange(len(document)) - np.repeat(np.cumsum(count) - count, count)
    start = document_starts[document] + nth * block_size
    end = document_ends[document].astype(np.int64)
    inputs = np.minimum(block_size, end - start)
    row = np.arange(len(start)) if packing == "pad" else best_fit(inputs, block_size)
    by_row = np.lexsort((-inputs, row))
    first = np.concatenate([[0], np.cumsum(np.bincount(row))])
    stop = np.minimum(start + inputs + 1, end)
    return Pieces(first, start[by_row], inputs[by_row], stop[by_row])


def best_fit(lengths: Ints, capacity: int) -> Ints:
    """The bin of each length by best-fit decreasing: longest first, into the fullest bin with room, else a new one.

    Pieces of one length are placed together: the fullest fitting bin stays the best one until it is full, so all bins
    with the same room are filled at once. The work grows with the number of distinct lengths, not of pieces.
    """
    bins = np.empty(len(lengths), dtype=np.int64)
    with_room: list[list[Ints]] = [[] for _ in range(capacity + 1)]
    occupied = 0  # bit r: some bin has room r
    opened = 0
    order = np.argsort(-lengths, kind="stable")
    for pieces in np.split(order, np.flatnonzero(np.diff(lengths[order])) + 1):
        size = int(lengths[pieces[0]]) if len(pieces) else 0
        while len(pieces):
            if fitting := occupied >> size:
                room = size + (fitting & -fitting).bit_length() - 1
                candidates = with_room[room].pop()
                if not with_room[room]:
                    occupied ^= 1 << room
            else:
                room = capacity
                candidates = np.arange(opened, opened + -(-len(pieces) // (capacity // size)))
                opened += len(candidates)
            each = room // size
            needed = min(len(candidates), -(-len(pieces) // each))
            placed = min(len(pieces), needed * each)
            bins[pieces[:placed]] = np.repeat(candidates[:needed], each)[:placed]
            in_last = placed - (needed - 1) * each
            for group, left in (
                (candidates[needed:], room),
                (candidates[: needed - 1], room - each * size),
                (candidates[needed - 1 : needed], room - in_last * size),
            ):
                if left and len(group):
                    with_room[left].append(group)
                    occupied |= 1 << left
            pieces = pieces[placed:]
    return bins
