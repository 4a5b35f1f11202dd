"""Which ends of a run are followed by another start, and which nodes it does without."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lit_gpt.launch.restarts import Restarts
from tests.support.programs import ROOT, environment

SUPERVISE = ROOT / "scripts/supervise.py"


def cause(step: int, node: str = "n1", how: str = "ended without a word (killed)", code: int = 1) -> dict[str, Any]:
    place = "save" if step else "set-up"
    return dict(
        rank=1, name=f"rank 1 on {node}", host=node, node=node, pid=7, how=how, code=code, step=step, place=place
    )


@pytest.mark.parametrize("code", [0, 2, 3, 74, 75, 130, 138, 143])
def test_ends_that_a_restart_does_not_mend(code: int) -> None:
    assert not Restarts(9).after(code, cause(5)).again


def test_a_refusal_of_one_rank_is_no_fault_of_a_machine() -> None:
    """Its peers may have been killed meanwhile: srun tells 137."""
    assert not Restarts(9).after(137, cause(0, how="failed (BadInput: ...)", code=2)).again


def test_a_silent_rank_is_lost_also_where_the_ranks_ask_for_a_requeue() -> None:
    assert Restarts(9, nodes=2, spares=1).after(75, cause(5, how="was silent for 25 s", code=75)).left_out == ("n1",)


def test_no_step_is_tried_more_than_three_times_nor_more_restarts_than_asked() -> None:
    known = Restarts(9)
    assert [known.after(137, cause(step)).again for step in (5, 9, 5, 5)] == [True, True, True, False]
    for end, where in ((cause(0), "in its set-up"), (None, "for an unknown reason"), (cause(4), "in step 5")):
        known = Restarts(9)
        ends = [known.after(137, end) for _ in range(3)]
        assert [end.again for end in ends] == [True, True, False]
        assert f"ended 3 times {where}" in ends[2].why
    known = Restarts(2)
    assert [known.after(1, None).again for _ in range(3)] == [True, True, False]
    assert not Restarts(0).after(137, cause(5)).again


def test_which_nodes_are_left_out() -> None:
    """With a spare at once, without one when named again; not for an exception, which may be the program's."""
    assert Restarts(9, nodes=3, spares=1).after(137, cause(5, "n1")).left_out == ("n1",)
    known = Restarts(9, nodes=2)
    found = [known.after(137, cause(step, node)).left_out for step, node in ((5, "n1"), (6, "n2"), (7, "n1"))]
    assert found == [(), (), ("n1",)]
    known = Restarts(9, nodes=3, spares=1)
    found = [known.after(137, cause(step, node)).left_out for step, node in ((5, "n1"), (6, "n2"), (7, "n2"))]
    assert found == [("n1",), ("n1",), ("n1", "n2")]
    known = Restarts(9)
    assert [known.after(137, cause(step)).left_out for step in (5, 6)] == [(), ()], "the only node"
    assert Restarts(9, nodes=3, spares=1).after(1, cause(5, how="failed (RuntimeError: x)")).left_out == ()


FLAKY = """
import json, os, sys
from pathlib import Path
starts = Path(sys.argv[1])
number = len(starts.read_text()) if starts.exists() else 0
starts.write_text("x" * (number + 1))
ends = json.loads(sys.argv[2])
end = ends[min(number, len(ends) - 1)]
if isinstance(end, list):  # a signal at a step
    cause = dict(rank=1, name="rank 1", host="a", node="a", pid=1, how="ended", code=1, step=end[1], place="x", at=1.0)
    (Path(os.environ["RUN_REPORT"]) / "cause.json").write_text(json.dumps(cause))
    os.kill(os.getpid(), end[0])
sys.exit(end)
"""


@pytest.mark.parametrize(
    ("ends", "code", "starts"),
    [
        ("[1, 0]", 0, 2), ("[2]", 2, 1), ("[1]", 1, 3), ("[[9, 4], [9, 5], [9, 6], [9, 7], 0]", 137, 4),
        ("[[9, 4], [9, 4], 0]", 0, 3), ("[[11, 4], [9, 8], [9, 4], 3]", 3, 4),
    ],
)  # fmt: skip
def test_a_command_is_started_again(tmp_path: Path, ends: str, code: int, starts: int) -> None:
    run = [sys.executable, SUPERVISE, "--restarts", "3", "--", sys.executable, "-c", FLAKY, tmp_path / "starts", ends]
    done = subprocess.run(run, env=environment(), capture_output=True, text=True, timeout=100)
    assert done.returncode == code, done.stderr
    assert (tmp_path / "starts").read_text() == "x" * starts
    assert done.stderr.count("supervisor: ") == starts - (code == 0), done.stderr


@pytest.mark.parametrize("stop", [signal.SIGUSR1, signal.SIGHUP])
def test_a_stop_signal_is_passed_on_and_final(tmp_path: Path, stop: signal.Signals) -> None:
    """The command ends with 1 after the signal, which would otherwise be followed by another start."""
    code = f"""
import signal, sys, time
signal.signal({int(stop)}, lambda *_: sys.exit(1))
open({str(tmp_path / "up")!r}, "a").write("x")
time.sleep(60)
"""
    command = ["env", "--default-signal=HUP", sys.executable, SUPERVISE, "--", sys.executable, "-c", code]
    process = subprocess.Popen(command, env=environment())
    deadline = time.monotonic() + 60
    while not (tmp_path / "up").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, stop)
    assert process.wait(timeout=60) == 1
    assert (tmp_path / "up").read_text() == "x"


def test_a_stopped_rank_that_is_left_over_is_killed(tmp_path: Path) -> None:
    code = f"""
import os, signal, subprocess, sys
from pathlib import Path
path = Path({str(tmp_path / "pid")!r})
if path.exists():
    sys.exit(0)
left = subprocess.Popen(["sleep", "500"])
os.kill(left.pid, signal.SIGSTOP)
path.write_text(str(left.pid))
sys.exit(1)
"""
    run = [sys.executable, SUPERVISE, "--", sys.executable, "-c", code]
    assert subprocess.run(run, env=environment(), timeout=100).returncode == 0
    left = Path("/proc") / (tmp_path / "pid").read_text() / "stat"
    assert not left.exists() or left.read_text().split()[2] == "Z"


def test_what_must_be_given(tmp_path: Path) -> None:
    for arguments in ([], ["--judge", "1"], ["--judge", "1", "--report", str(tmp_path), "--", "true"]):
        done = subprocess.run([sys.executable, SUPERVISE, *arguments], capture_output=True, text=True, timeout=60)
        assert done.returncode == 2
        assert "give a command after --, or --judge and --report" in done.stderr
