"""Stochastic rounding of sharded bf16 weights gives the bits that one process gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from lit_gpt.train.adamw import RoundingAdamW
from tests.support.programs import call_on_ranks
from tests.train.test_adamw import random, steps

pytestmark = pytest.mark.distributed

SHAPES = ((5, 8), (7,))  # rows that two processes cannot share evenly


def train_part(rank: int, folder: Path) -> None:
    """Two copies of the weights, each on two processes."""
    mesh = init_device_mesh("cpu", (2, 2))
    weights: list[Tensor] = [
        distribute_tensor(random(*shape, seed=1), mesh, [Replicate(), Shard(0)]).requires_grad_() for shape in SHAPES
    ]
    steps(RoundingAdamW, weights, lr=1e-3, count=5, decay=0.1)
    torch.save([weight.to_local() for weight in weights], folder / f"{rank}.pth")  # type: ignore[attr-defined]


def test_parts_round_as_the_whole(tmp_path: Path) -> None:
    call_on_ranks(train_part, tmp_path, 4)
    whole = [random(*shape, seed=1).requires_grad_() for shape in SHAPES]
    steps(RoundingAdamW, whole, lr=1e-3, count=5, decay=0.1)
    parts = [torch.load(tmp_path / f"{rank}.pth") for rank in range(4)]
    for number, weight in enumerate(whole):
        for first, second in ((0, 1), (2, 3)):
            assert torch.equal(torch.cat((parts[first][number], parts[second][number])), weight)
