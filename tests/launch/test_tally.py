"""What the ranks put together: alone, and three gloo processes."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from lit_gpt.launch.tally import tally

LARGE = 2**62
"""Beyond the whole numbers of a double."""


def test_alone() -> None:
    assert tally([3, True, LARGE + 1]) == [3, 1, LARGE + 1]
    assert tally([-3], "min") == [-3]


def rank_of_three(rank: int, meeting: Path, answers: Any) -> None:
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=3)
    other = dist.new_group(backend="gloo")
    found = [
        tally([rank + 1, rank == 2, LARGE // 4 + rank]),
        tally([rank - 1, -rank], "min", other),
        tally([rank - 1, -rank], "max"),
    ]
    answers.put(found)
    dist.destroy_process_group()


@pytest.mark.distributed
@pytest.mark.slow
def test_every_rank_has_the_same(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    ranks = [context.Process(target=rank_of_three, args=(rank, tmp_path / "meeting", answers)) for rank in range(3)]
    for rank in ranks:
        rank.start()
    found = [answers.get(timeout=300) for _ in ranks]
    for rank in ranks:
        rank.join()
    wanted = [[6, 1, 3 * (LARGE // 4) + 3], [-1, -2], [1, 0]]
    assert found == [wanted] * 3
