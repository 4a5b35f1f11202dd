"""Copies of the weights stay the same, bit by bit: one norm for all, and a comparison before each save."""

from __future__ import annotations

import math
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from lit_gpt.launch.mesh import make_mesh
from lit_gpt.train.optimizer import gradient_norm
from lit_gpt.train.replicas import CopiesDiffer, hash_of, odd_ranks, require_equal_copies
from tests.support.programs import call_on_ranks, environment, run_program
from tests.support.training import command
from tests.train.test_step_guard import FAULTY


def as_copies(rank: int, folder: Path) -> None:
    """Two copies on one process each; what they find goes to a file of each rank."""
    mesh = make_mesh("cpu", {"replicate": 2, "shard": 1}, timedelta(seconds=60))

    def sharded(values: list[float]) -> DTensor:
        return DTensor.from_local(torch.tensor(values), mesh, [Replicate(), Shard(0)])

    norms = []
    for own in ([3.0, 5.0], [5.0, 5.000001], [5.0, math.nan], [-math.nan, 5.0], [math.inf, 5.0]):
        weight = torch.nn.Parameter(sharded([0.0, 0.0]))
        weight.grad = sharded([own[rank], 0.0])
        norms.append(gradient_norm([weight]).item())

    weight = torch.nn.Parameter(sharded([1.0, 2.0]))
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    weight.grad = sharded([1.0, 1.0])
    optimizer.step()
    require_equal_copies(optimizer, 2, f"rank {rank} on here")
    moment = optimizer.state[weight]["exp_avg_sq"].to_local()
    if rank == 1:
        moment[1] = torch.nextafter(moment[1], torch.tensor(1.0))
    require_equal_copies(optimizer, 1, "of one copy nothing is compared")
    try:
        require_equal_copies(optimizer, 2, f"rank {rank} on here")
        said = "equal"
    except CopiesDiffer as error:
        said = str(error)
    torch.save((norms, said), folder / f"{rank}.pth")  # type: ignore[attr-defined]


@pytest.mark.distributed
@pytest.mark.slow
def test_copies_take_one_norm_and_a_bit_that_differs_is_found(tmp_path: Path) -> None:
    call_on_ranks(as_copies, tmp_path, 2)
    for rank in (0, 1):
        norms, said = torch.load(tmp_path / f"{rank}.pth")
        assert norms[:2] == [5.0, torch.tensor(5.000001).item()], "the largest, also by the last bit"
        assert math.isnan(norms[2])
        assert math.isnan(norms[3])
        assert norms[4] == math.inf
        assert said.startswith("the weights or moments of rank 1 on here are not those of the other copies: ")


def test_odd_ranks() -> None:
    """Neighbouring ranks share a copy; of two copies, the first counts as right."""
    assert odd_ranks([7, 8, 7, 8], copies=2) == []
    assert odd_ranks([7, 8, 7, 9], copies=2) == [3]
    assert odd_ranks([6, 7, 7, 7], copies=4) == [0]
    assert odd_ranks([6, 1, 7, 2, 7, 2], copies=3) == [0, 1]
    assert odd_ranks([5, 6, 7], copies=3) == [1, 2]


def test_every_change_changes_the_hash() -> None:
    grid = torch.arange(12.0).view(3, 4)
    vector, number, empty = torch.tensor([0.0, 1.0]), torch.tensor(3.0), torch.empty(0, 4)
    same = [grid, grid.bfloat16(), vector, number, empty, grid.view(3, 2, 2)]

    def changed() -> Iterator[list[Tensor]]:
        for at, tensor in enumerate(same):
            for place in range(tensor.numel()):
                tensors = [tensor.clone() for tensor in same]
                flat = tensors[at].view(-1)
                flat[place] = torch.nextafter(flat[place], torch.tensor(99.0, dtype=flat.dtype))
                yield tensors
        yield [grid[[1, 0, 2]], *same[1:]]
        yield [*same[1:], grid]
        yield [*same[:2], torch.tensor([-0.0, 1.0]), *same[3:]]
        yield [grid * torch.tensor([[2.0], [2.0], [1.0]]), *same[1:]]

    wanted = int(hash_of(iter(same)))
    hashes = [int(hash_of(iter(tensors))) for tensors in changed()]
    assert len(hashes) == 12 + 12 + 2 + 1 + 12 + 4
    assert wanted not in hashes
    assert int(hash_of(iter(tensor.clone() for tensor in same))) == wanted


def test_a_change_far_down_a_large_bf16_weight_is_seen() -> None:
    """Of its values as 64-bit floats, only the upper 19 bits are in use: without mixing, 2^20 times them is 0."""
    weight = torch.ones((1 << 20) + 1, 1, dtype=torch.bfloat16)
    before = int(hash_of(iter([weight])))
    weight[1 << 20] = 1.0078125
    assert int(hash_of(iter([weight]))) != before


def test_the_hash_by_hand() -> None:
    """1.0 is 0x3FF0000000000000 and 2.0 is 0x4000000000000000."""

    def mixed(x: int) -> int:
        return ((x ^ x >> 32) * 6364136223846793005) % 2**64

    wanted = (mixed(mixed(0x7FF0000000000000) + 0) + mixed(mixed(0x4000000000000000) + 1)) % 2**64
    assert int(hash_of(iter([torch.tensor([[1.0, 2.0], [2.0, 0.0]])]))) % 2**64 == wanted


@pytest.mark.distributed
@pytest.mark.slow
def test_copies_that_part_end_the_run_unsaved(store: Path, tmp_path: Path) -> None:
    """A weight of rank 1 changes by one bit in step 3: the save after step 2 is there, that after step 4 is not."""
    done = run_program(
        command(
            store, tmp_path, program=FAULTY, devices=2, micro_batch_size=2, sharding_strategy="NO_SHARD",
            save_interval_steps=2, keep_last_checkpoints=0,
        ),
        env=environment(FAULTS="3:1:other_weight"), fresh=True,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "ERROR" in line]
    assert "ERROR after step 4: the weights or moments of rank 1 on " in line
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.glob("*iter-*")] == ["iter-00000002-ckpt.pth"]
