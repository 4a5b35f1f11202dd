"""What the other ranks say and do while rank 0 works for all."""

from __future__ import annotations

import logging
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from lit_gpt.cli import BadInput
from lit_gpt.launch import ranks
from lit_gpt.launch.fabric import Fabric
from lit_gpt.launch.mesh import make_mesh
from lit_gpt.launch.ranks import Ranks
from lit_gpt.launch.settings import WatchdogSettings
from lit_gpt.launch.watchdog import Watchdog
from tests.support.processes import wait_for


class OneOfMany:
    """A rank of a Fabric whose broadcasts end when the test says so, with what rank 0 would have sent."""

    def __init__(self, rank: int, local_rank: int, sent: Any = None) -> None:
        self.global_rank, self.local_rank, self.is_global_zero = rank, local_rank, rank == 0
        self.comes, self._sent = threading.Event(), sent

    def broadcast(self, value: Any) -> Any:
        assert self.comes.wait(60)
        if isinstance(self._sent, RuntimeError):
            raise self._sent
        return value if self.is_global_zero else self._sent


def ranks_of(fabric: Any, tmp_path: Path, **limits: float) -> tuple[Ranks, Watchdog]:
    settings = WatchdogSettings(**{"watchdog_factor": 0, **limits})
    watchdog = Watchdog(tmp_path, "this rank", fabric.global_rank, 4, settings)
    return Ranks(fabric, watchdog), watchdog


def test_a_wait_for_rank_zero_is_told_at_doubling_times(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setattr(ranks, "FIRST_TOLD_S", 0.05)
    fabric = OneOfMany(1, 1)
    seen, watchdog = ranks_of(fabric, tmp_path, watchdog_long_s=7000)
    waiting = threading.Thread(target=seen.on_zero, args=("reading the checkpoint", lambda: pytest.fail("not rank 0")))
    waiting.start()
    wait_for(lambda: len(caplog.messages) >= 3)
    assert watchdog._place == "set-up: waiting for rank 0"
    fabric.comes.set()
    waiting.join(60)
    assert watchdog._place == "set-up"
    assert caplog.messages[0] == "waiting for rank 0, which is reading the checkpoint (0 s so far, at most 7000)"
    times = [record.created for record in caplog.records[:3]]
    assert times[2] - times[1] >= 0.09, "0.1 s after the start, then 0.2 s"


@pytest.mark.parametrize(("rank", "local_rank", "speaks"), [(1, 1, True), (8, 0, True), (9, 1, False), (2, 2, False)])
def test_one_waiting_rank_of_each_node_speaks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, rank: int, local_rank: int, speaks: bool
) -> None:
    fabric = OneOfMany(rank, local_rank)
    seen, _ = ranks_of(fabric, tmp_path)
    with seen._told("reading"):
        names = [thread.name for thread in threading.enumerate()]
        assert ("tells-the-wait" in names) == speaks
    wait_for(lambda: "tells-the-wait" not in [thread.name for thread in threading.enumerate()])


def test_what_rank_zero_refuses_ends_all(tmp_path: Path) -> None:
    zero, other = OneOfMany(0, 0), OneOfMany(1, 1, sent=BadInput("no"))
    for fabric in (zero, other):
        fabric.comes.set()
    seen, watchdog = ranks_of(zero, tmp_path)

    def refuse() -> None:
        assert watchdog._place == "set-up: reading"
        raise BadInput("no such thing")

    with pytest.raises(BadInput, match="no such thing"):
        seen.on_zero("reading", refuse)
    with pytest.raises(SystemExit) as ended:
        ranks_of(other, tmp_path)[0].on_zero("reading", refuse)
    assert ended.value.code == 2


def test_without_a_watchdog_the_group_ends_the_wait(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A lost connection is another thing: it keeps its error."""
    fabric = OneOfMany(3, 0, sent=RuntimeError("timed out"))
    fabric.comes.set()
    with pytest.raises(SystemExit) as ended:
        ranks_of(fabric, tmp_path, watchdog_long_s=1e-9, watchdog_floor_s=1e-9)[0].on_zero("reading", lambda: None)
    assert ended.value.code == 1
    assert [record.message for record in caplog.records if record.levelno == logging.ERROR] == [
        "rank 0, which is reading, did not come within 0 s"
    ]
    with pytest.raises(RuntimeError, match="timed out"):
        ranks_of(fabric, tmp_path)[0].on_zero("reading", lambda: None)


def test_alone_nobody_waits(tmp_path: Path) -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    assert ranks_of(fabric, tmp_path)[0].on_zero("reading", lambda: 7) == 7


@pytest.mark.parametrize(
    ("long_s", "floor_s", "timeout_s"), [(1800.0, 300.0, 1860), (20000.0, 300.0, 20060), (5.0, 300.0, 360)]
)
def test_the_watchdogs_limit_is_that_of_every_group(
    monkeypatch: pytest.MonkeyPatch, long_s: float, floor_s: float, timeout_s: int
) -> None:
    """Rank 5 of two copies on four ranks each, and of eight copies on one."""
    limits = WatchdogSettings(watchdog_long_s=long_s, watchdog_floor_s=floor_s)
    made, new_group = [], dist.new_group

    def noting(members: list[int], timeout: timedelta) -> Any:
        made.append((members, timeout.total_seconds()))
        return new_group(members, timeout=timeout)

    monkeypatch.setattr(dist, "new_group", noting)
    dist.init_process_group("fake", rank=5, world_size=8)
    try:
        mesh = make_mesh("cpu", {"replicate": 2, "shard": 4}, limits.group_timeout)
        assert made == [
            ([0, 4], timeout_s), ([1, 5], timeout_s), ([2, 6], timeout_s), ([3, 7], timeout_s),
            ([0, 1, 2, 3], timeout_s), ([4, 5, 6, 7], timeout_s),
        ]  # fmt: skip
        assert mesh.mesh.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
        assert mesh.mesh_dim_names == ("replicate", "shard")
        assert [dist.get_process_group_ranks(mesh.get_group(dim)) for dim in (0, 1)] == [[1, 5], [4, 5, 6, 7]]
        made.clear()
        mesh = make_mesh("cpu", {"replicate": 8, "shard": 1}, limits.group_timeout)
        assert made == [([rank], timeout_s) for rank in range(8)], "the first dimension is the group of all"
        assert [mesh.get_group(dim) is dist.group.WORLD for dim in (0, 1)] == [True, False]
        assert make_mesh("cpu", {"shard": 8}, limits.group_timeout).get_group() is dist.group.WORLD
    finally:
        dist.destroy_process_group()
