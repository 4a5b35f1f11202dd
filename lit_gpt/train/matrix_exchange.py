"""Whole matrices out of sharded ones, each on one rank, and back: the ranks' all-to-all exchanges.

The ranks that share one copy of the weights each hold some rows of every matrix. Of matrices of one shape, rank r takes
those with number r, r + ranks, ...: in `gather` all ranks send it their rows of these, and in `scatter` it sends each
rank its rows back. Each number travels twice; what one rank sends shrinks with the number of ranks. Ranks may hold
unequal numbers of rows, or none, and there may be fewer matrices than ranks.

With one rank, both are views.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor


class Matrix(NamedTuple):
    """Some rows of a weight, which may be sharded by rows."""

    weight: Tensor
    first_row: int
    rows: int

    @property
    def columns(self) -> int:
        return self.weight.shape[1]


class MatrixExchange:
    """Of matrices of one shape, whose weights are sharded alike."""

    def __init__(self, matrices: Sequence[Matrix]) -> None:
        self.shape = matrices[0].rows, matrices[0].columns
        self._group, self._ranks, self._rank = _sharding(matrices[0].weight)
        owned = [list(matrices[rank :: self._ranks]) for rank in range(self._ranks)]
        self.matrices = [matrix for of_rank in owned for matrix in of_rank]
        """In the order in which this rank's rows of them stand in what `gather` takes and `scatter` gives."""
        self._own = owned[self._rank]
        self._sent = [sum(self._numbers(matrix, self._rank) for matrix in of_rank) for of_rank in owned]
        """Numbers for each rank."""
        self._received = [[self._numbers(m, rank) for m in self._own] for rank in range(self._ranks)]
        """Numbers from each rank, of each own matrix."""

    @classmethod
    def rounds(cls, matrices: Sequence[Matrix], most_numbers: int) -> list[MatrixExchange]:
        """Exchanges one after another in which a rank takes at most so many numbers, but at least one matrix."""
        _, ranks, _ = _sharding(matrices[0].weight)
        each = ranks * max(1, most_numbers // (matrices[0].rows * matrices[0].columns))
        return [cls(matrices[first : first + each]) for first in range(0, len(matrices), each)]

    def gather(self, rows: Tensor) -> Tensor:
        """This rank's rows of all matrices (numbers,) to its matrices (B, R, C); B may be 0."""
        if self._group is None:
            return rows.view(-1, *self.shape)
        found = self._exchange(rows, self._sent, [sum(numbers) for numbers in self._received])
        pieces = found.split([n for numbers in self._received for n in numbers])
        whole = found.new_empty(len(self._own), self.shape[0] * self.shape[1])
        for number, matrix in enumerate(whole):
            torch.cat(pieces[number :: len(whole)], out=matrix)
        return whole.view(-1, *self.shape)

    def scatter(self, whole: Tensor) -> Tensor:
        """The reverse: this rank's matrices (B, R, C) to its rows of all matrices (numbers,)."""
        if self._group is None:
            return whole.reshape(-1)
        parts = [
            matrix[self._within(own, rank)].reshape(-1)
            for rank in range(self._ranks)
            for matrix, own in zip(whole, self._own, strict=True)
        ]
        sent = torch.cat(parts) if parts else whole.reshape(-1)
        return self._exchange(sent, [sum(numbers) for numbers in self._received], self._sent)

    def _exchange(self, sent: Tensor, numbers: list[int], found_numbers: list[int]) -> Tensor:
        found = sent.new_empty(sum(found_numbers))
        dist.all_to_all_single(found, sent, found_numbers, numbers, group=self._group)
        return found

    # Rows

    def shard_rows(self, matrix: Matrix, rank: int | None = None) -> range:
        """The rows of the matrix's weight that a rank (by default this one) holds; FSDP shards as torch.chunk does."""
        rank, rows = self._rank if rank is None else rank, matrix.weight.shape[0]
        each = -(-rows // self._ranks)
        return range(min(rank * each, rows), min((rank + 1) * each, rows))

    def own_rows(self, matrix: Matrix, rank: int | None = None) -> range:
        """The rows of the weight that belong to the matrix and that the rank holds."""
        shard = self.shard_rows(matrix, rank)
        last = matrix.first_row + matrix.rows
        first = min(max(shard.start, matrix.first_row), last)
        return range(first, max(first, min(shard.stop, last)))

    def _within(self, matrix: Matrix, rank: int) -> slice:
        """The rows of the matrix that the rank holds."""
        rows = self.own_rows(matrix, rank)
        return slice(rows.start - matrix.first_row, rows.stop - matrix.first_row)

    def _numbers(self, matrix: Matrix, rank: int) -> int:
        return len(self.own_rows(matrix, rank)) * matrix.columns


def _sharding(weight: Tensor) -> tuple[dist.ProcessGroup | None, int, int]:
    """The ranks that share one copy of a weight: their group (None if there is one), number, and this rank's place."""
    if isinstance(weight, DTensor):
        for dim, placement in enumerate(weight.placements):
            if placement.is_shard(0) and weight.device_mesh.size(dim) > 1:
                mesh = weight.device_mesh
                return mesh.get_group(dim), mesh.size(dim), mesh.get_local_rank(dim)
    return None, 1, 0
