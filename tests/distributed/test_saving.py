"""Checkpoints of several processes: a rank killed while they are written, a full disk, other numbers of processes."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from lit_gpt.checkpoint.checkpoint import verified
from lit_gpt.checkpoint.history import find
from tests.support.programs import environment
from tests.support.training import command, metrics, seen_rows, small_disk, train

pytestmark = pytest.mark.distributed

PARTS = dict(devices=2, micro_batch_size=2, save_interval_steps=1, eval_interval_steps=100, async_save="true")


@pytest.fixture(scope="module")
def unbroken(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("unbroken")
    train(store, out, **PARTS)
    return out


def ranks_of(launcher: int) -> list[int]:
    """Process ids by rank: the program itself, and the process that it started."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    return [
        launcher,
        *(int(child) for child in children if b"--out_dir" in Path(f"/proc/{child}/cmdline").read_bytes()),
    ]


def wait_until_gone(process_ids: list[int]) -> None:
    """Wait until the processes are gone; a zombie counts as gone, as another process has to reap it."""
    deadline = time.monotonic() + 300
    for number in process_ids:
        while os.path.exists(f"/proc/{number}"):
            if Path(f"/proc/{number}/stat").read_text().split()[2] == "Z":
                break
            assert time.monotonic() < deadline, "a rank outlives the others"
            time.sleep(0.05)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_killed_while_weights_are_written(store: Path, unbroken: Path, tmp_path: Path, rank: int) -> None:
    """No partial checkpoint counts, the other rank ends too, and the resumed run equals the uninterrupted one."""
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command(store, tmp_path / "run", **PARTS), env=environment(), stderr=log)
        while not (written := list((tmp_path / "run").glob(".saving-iter-0000000[4-9]*/state/__1_0.distcp"))):
            assert process.poll() is None, (tmp_path / "log").read_text()
        ranks = ranks_of(process.pid)
        assert len(ranks) == 2
        os.kill(ranks[rank], signal.SIGKILL)
        assert process.wait(timeout=300) != 0
    wait_until_gone(ranks[1:])
    found = find("auto", tmp_path / "run")
    assert found is not None
    killed_at = int(written[0].parents[1].name.split("-")[2])
    assert killed_at - 1 <= found.step <= killed_at + 1
    train(store, tmp_path / "run", resume="auto", **PARTS)
    assert metrics(tmp_path / "run") == metrics(unbroken)
    assert seen_rows(tmp_path / "run") == seen_rows(unbroken)
    assert not list((tmp_path / "run").glob(".saving-*"))


@pytest.mark.parametrize("kind", ["sharded", "full"])
def test_a_full_disk_costs_checkpoints_only(store: Path, tmp_path: Path, kind: str) -> None:
    """Room for one and a half checkpoints, of which two are to be kept: training runs to its end and reports it."""
    with small_disk(tmp_path / "disk", size=18 << 20) as disk:
        done = train(store, disk / "run", expect=74, state_dict_type=kind, **PARTS | {"save_interval_steps": 4})
        assert "room for 1" in done.stderr
        assert done.stderr.count("was NOT saved: [Errno 28] No space left on device") == 2
        assert done.stderr.count("ended after step 12, without its last checkpoint") == 1
        assert "Traceback" not in done.stderr
        assert [path.name for path in (disk / "run").glob("*iter-*")] == ["iter-00000004-ckpt.pth"]
        verified(disk / "run" / "iter-00000004-ckpt.pth")
        assert len(metrics(disk / "run")) == 12
