"""A rank that hangs: SIGSTOP to one of two processes (fault case 13), and which rank the watchdog names."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

import pytest

from lit_gpt.launch.settings import WatchdogSettings
from lit_gpt.launch.watchdog import Heartbeat, find_fault, limit_s, poll_s
from tests.support.programs import environment
from tests.support.training import SECRETS, assert_no_secret, command, metrics

pytestmark = pytest.mark.distributed

ENDLESS = dict(max_steps=100_000, max_epochs=100_000, save_interval_steps=100_000, eval_interval_steps=100_000)


def start(store: Path, out: Path, log: IO[str], *, in_slurm: bool, **settings: object) -> subprocess.Popen[str]:
    extra = {"SLURM_JOB_ID": "7", "REQUEUE_FILE": str(out / "requeue")} if in_slurm else {}
    extra |= SECRETS
    flags = command(store, out, devices=2, micro_batch_size=2, watchdog_floor_s=4, **ENDLESS | settings)
    return subprocess.Popen(flags, env=environment(**extra), stderr=log, text=True)


def child_of(process: subprocess.Popen[str]) -> int:
    """Rank 1, which rank 0 started."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    (rank_one,) = [pid for pid in children if b"tinyllama" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    return int(rank_one)


def wait_for_steps(out: Path, steps: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 240
    while not (out / "metrics.csv").exists() or len(metrics(out)) < steps:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_rank_is_named_and_the_run_ends(store: Path, tmp_path: Path, stopped: int) -> None:
    """Rank 1 in a Slurm job: 75 and the batch script's file. Rank 0, which also holds the store of the rendezvous."""
    with (tmp_path / "log").open("w") as log:
        process = start(store, tmp_path, log, in_slurm=stopped == 1)
        wait_for_steps(tmp_path, 5, process)
        child = child_of(process)
        victim, other = (process.pid, child) if stopped == 0 else (child, process.pid)
        os.kill(victim, signal.SIGSTOP)
        try:
            began = time.monotonic()
            if stopped == 1:
                assert process.wait(timeout=240) == 75
            else:
                while state(other) not in "Z":
                    assert time.monotonic() < began + 240
                    time.sleep(0.1)
            assert time.monotonic() - began >= 4
        finally:
            os.kill(victim, signal.SIGKILL)
        process.wait()
    lines = (tmp_path / "log").read_text().splitlines()
    told = [line for line in lines if "watchdog:" in line]
    assert re.search(rf"watchdog: rank {1 - stopped} on \S+ has been in step \d+ for \d+ s, at 'agree|update", told[0])
    assert re.search(rf"watchdog: at fault: rank {stopped} on \S+, silent for \d+ s at '\w+'\. The process", told[-1])
    assert lines[-1] == told[-1]
    stacks = (tmp_path / "watchdog" / f"stacks-rank-{1 - stopped:05d}.txt").read_text()
    assert "trainer.py" in stacks
    assert "loader.py" in stacks, "the loader's thread is a thread of the rank"
    assert (tmp_path / "requeue").exists() == (stopped == 1)
    assert_no_secret(tmp_path)  # the log is there, too


def state(pid: int) -> str:
    """The state of a process: Z once it has ended and its stopped parent has not reaped it."""
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]


def test_a_second_stall_from_the_same_checkpoint_is_not_requeued(tmp_path: Path) -> None:
    """Processes whose main thread sleeps in its fourth step: 75, then 1; from a later checkpoint 75 again."""
    code = """
import os, sys, time
from pathlib import Path
from lit_gpt.launch.settings import WatchdogSettings
from lit_gpt.launch.watchdog import Watchdog

def stall(started_from):
    limits = WatchdogSettings(watchdog_factor=3, watchdog_floor_s=1.0, watchdog_long_s=50)
    watchdog = Watchdog(Path(sys.argv[1]), "rank 0 on here", 0, 1, limits)
    for step in range(3):
        time.sleep(0.1)
        watchdog.step_done(started_from + step + 1)
    time.sleep(50)
    os._exit(99)

for started_from in (10, 10, 20):
    child = os.fork() or stall(started_from)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    run = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(run, env=environment(SLURM_JOB_ID="7"), capture_output=True, text=True, timeout=200)
    assert done.stdout.split() == ["75", "1", "75"], done.stderr
    assert done.stderr.count("no requeue: no step since the start, or the second stall from step 10") == 1


def test_limits() -> None:
    settings = WatchdogSettings(watchdog_factor=10, watchdog_floor_s=300, watchdog_long_s=1800)
    assert poll_s(settings) == 15
    assert limit_s(settings, "update", steps_done=100, median_s=2.0) == 300
    assert limit_s(settings, "update", steps_done=100, median_s=60.0) == 600
    assert limit_s(settings, "update", steps_done=1, median_s=60.0) == 1800
    assert limit_s(settings, "save", steps_done=100, median_s=2.0) == 1800
    assert limit_s(settings, "rollback: waiting for rank 0", steps_done=100, median_s=2.0) == 1800


def test_a_rank_that_is_stopped_within_a_heartbeat_leaves_a_whole_one(tmp_path: Path) -> None:
    """SIGKILL at each operation on files of a heartbeat (step 1), as an audit hook sees them; the one before is 0."""
    code = """
import os, signal, sys
from pathlib import Path
from lit_gpt.launch.settings import WatchdogSettings
from lit_gpt.launch.watchdog import Watchdog, read_heartbeats

folder, left = Path(sys.argv[1]), 0

def kill(event, arguments):
    global left
    if event in ("open", "os.rename") and str(folder) in str(arguments[0]):
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

def beat(allowed):
    global left
    left = allowed
    sys.addaudithook(kill)
    watchdog.step_done(1)
    watchdog._beat(warn=True)
    os._exit(0)

for allowed in range(3):
    watchdog = Watchdog(folder, "rank 0 on here", 0, 1, WatchdogSettings(watchdog_factor=0))
    watchdog._beat(warn=True)
    child = os.fork() or beat(allowed)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), *next(read_heartbeats(folder, 1, 0))[1:3])
"""
    run = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(run, env=environment(), capture_output=True, text=True, timeout=200)
    assert done.stdout.splitlines() == ["-9 rank 0 on here 0", "-9 rank 0 on here 0", "0 rank 0 on here 1"], done.stderr


def test_find_fault() -> None:
    """Silence counts most, then an earlier step, then not having come to where the ranks wait."""
    a, b = Heartbeat(0, "rank 0 on n1", 7, "agree", 0.1), Heartbeat(1, "rank 1 on n2", 7, "data", 0.2)
    assert find_fault([a, b._replace(silent_s=60.0)], 30).startswith(
        "at fault: rank 1 on n2, silent for 60 s at 'data'"
    )
    assert find_fault([a, b], 30).startswith("at fault: rank 1 on n2, at 'data' of step 8")
    assert find_fault([a, b._replace(step=6)], 30).startswith("at fault: rank 1 on n2, at 'data' of step 7")
    alone = [a._replace(place="set-up: reading a checkpoint"), b._replace(place="set-up: waiting for rank 0")]
    assert find_fault(alone, 30) == (
        "at fault: rank 0 on n1, at 'set-up: reading a checkpoint' of step 8, for which the others wait"
    )
    everybody = [a._replace(place="update"), b._replace(place="update")]
    assert find_fault(everybody, 30).startswith("all ranks hang at the same place")
