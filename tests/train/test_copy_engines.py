"""When weights are not gathered by copy engines, and why; tests/gpu/test_copy_engines.py gathers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from lit_gpt.train import copy_engines
from lit_gpt.train.copy_engines import why_not

GPU = torch.device("cuda", 0)


@pytest.fixture
def group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dist.ProcessGroup]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda one, other: True)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 28, 9))
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_an_old_nccl(group: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 27, 5))
    assert why_not(group, GPU) == "NCCL 2.27.5 is older than 2.28"


def test_gpus_that_do_not_reach_each_other(group: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda one, other: False)
    assert why_not(group, GPU) == "cuda:0 has no direct access to the other GPUs"


def test_a_torch_without_the_pool(group: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copy_engines, "symmetric_memory", SimpleNamespace())
    assert why_not(group, GPU) == f"torch {torch.__version__} has no pool of symmetric memory"


def test_copies_over_several_hosts(group: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    def gathered(answers: list[str | None], mine: str | None, group: dist.ProcessGroup) -> None:
        answers[:] = ["a", "b"] if mine is not None and answers == [""] else [mine]

    monkeypatch.setattr(dist, "all_gather_object", gathered)
    assert why_not(group, GPU) == "one copy of the weights lies on 2 hosts"


def test_a_failing_trial_says_why(group: dist.ProcessGroup) -> None:
    why = why_not(group, GPU)  # this machine's torch has no NCCL
    assert why is not None
    assert why.startswith("a small all-gather fails: ")
