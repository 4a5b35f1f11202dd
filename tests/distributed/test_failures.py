"""A rank that fails in the midst of training: the others say which and why, and all end with its exit code."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from tests.support.programs import environment, run_program
from tests.support.training import command
from tests.train.test_step_guard import FAULTY

pytestmark = pytest.mark.distributed

SETTINGS = dict(devices=2, micro_batch_size=2, save_interval_steps=4, async_save="true")


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.long)])
@pytest.mark.parametrize("kind", ["bad_input", pytest.param("error", marks=pytest.mark.long)])
def test_one_rank_fails_in_step_5(store: Path, tmp_path: Path, kind: str, rank: int) -> None:
    """While the checkpoint of step 4 may still be on its way to the disk."""
    run = tmp_path / "run"
    faults = environment(FAULTS=f"5:{rank}:{kind}")
    done = run_program(command(store, run, program=FAULTY, **SETTINGS), env=faults, fresh=True)
    why = {"bad_input": "a shard has gone: put it back", "error": "OSError: [Errno 5] Input/output error"}[kind]
    own = {"bad_input": f"error: {why}", "error": f"failed at step 5: {why}"}[kind]
    assert done.returncode == {"bad_input": 2, "error": 1}[kind], done.stderr
    assert done.stderr.count(own) == 1
    assert f"all ranks end, since rank {rank} on {socket.gethostname()} cannot go on: {why}\n" in done.stderr
    assert done.stderr.count("all ranks end") == 1
    assert done.stderr.count("Traceback") == (kind == "error"), "only that of the rank that failed"
    assert "gloo" not in done.stderr
    assert (run / "iter-00000004-ckpt.pth/MANIFEST.json").is_file()
    assert not list(run.glob("iter-00000005*"))
