"""Runs that stop early: signals at any moment, the end of the job, a port in use, a rank that fails."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lit_gpt.launch.settings import StopSettings
from lit_gpt.launch.signals import StopFlag
from lit_gpt.launch.stop import StopRequest
from tests.support.programs import ROOT, environment
from tests.support.training import command, metrics, train

ENDLESS = dict(max_steps=100_000, max_epochs=100_000, save_interval_steps=100_000, eval_interval_steps=100_000)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_before_the_first_step_is_a_clean_stop(store: Path, tmp_path: Path, number: signal.Signals) -> None:
    """It comes while Python imports torch: as soon as the thread that takes signals is there."""
    in_slurm = number == signal.SIGUSR1
    process = subprocess.Popen(
        command(store, tmp_path, **ENDLESS), env=environment(**{"SLURM_JOB_ID": "1"} if in_slurm else {}),
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while len(list(Path(f"/proc/{process.pid}/task").iterdir())) < 2:
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(number)
    _, log = process.communicate(timeout=240)
    assert process.returncode == (75 if in_slurm else 0), log
    assert f"stopped by a signal ({number.name}) before the first step: nothing new to save" in log
    assert not list(tmp_path.glob("iter-*"))


@pytest.mark.distributed
def test_a_signal_to_one_rank_during_set_up_stops_all(store: Path, tmp_path: Path) -> None:
    """To rank 1 alone, as soon as it listens; rank 0 has not had a signal."""
    process = subprocess.Popen(
        command(store, tmp_path, devices=2, micro_batch_size=2, **ENDLESS), env=environment(), stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    listening: list[int] = []
    while not listening:
        assert process.poll() is None
        pids = [int(pid) for pid in children.read_text().split()]
        listening = [pid for pid in pids if len(list(Path(f"/proc/{pid}/task").iterdir())) > 1 and is_program(pid)]
        time.sleep(0.002)
    subprocess.run(["kill", "-USR1", str(listening[0])], check=True)
    _, log = process.communicate(timeout=240)
    assert process.returncode == 0, log
    assert "stopped by a signal (to another rank) before the first step" in log


def is_program(pid: int) -> bool:
    return b"tinyllama_fabric.py" in Path(f"/proc/{pid}/cmdline").read_bytes()


def test_helpers_ignore_the_signals(tmp_path: Path) -> None:
    """A process that a program with a StopFlag starts, and the workers of a pool from their first moment."""
    code = """
import os, signal, subprocess, sys
from lit_gpt.launch.signals import StopFlag
from lit_gpt.prepare.worker_pool import run_pool

class Double:
    def __call__(self, task):
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT):
            os.kill(os.getpid(), number)
        return 2 * task
    def finish(self):
        return 0

if __name__ == "__main__":
    flag = StopFlag()
    child = subprocess.Popen(["sleep", "0.3"])
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT):
        child.send_signal(number)
    print(child.wait(), sorted(run_pool(2, Double, (), range(4))), flag.received)
"""
    (tmp_path / "program.py").write_text(code)
    run = [sys.executable, str(tmp_path / "program.py")]
    done = subprocess.run(run, env=environment(PYTHONPATH=str(ROOT)), capture_output=True, text=True, timeout=240)
    assert done.stdout == "0 [0, 0, 0, 2, 4, 6] None\n", done.stderr


@pytest.mark.slow
@pytest.mark.distributed
def test_the_end_of_the_job_saves_in_time_on_all_ranks(store: Path, tmp_path: Path) -> None:
    """SLURM_JOB_END_TIME a little ahead, of which two fifths are kept free; nobody sends a signal."""
    for ahead_s in (20, 60, 180):  # a slow machine imports torch, or ends, when the shorter ones are over
        end, run = int(time.time()) + ahead_s, tmp_path / str(ahead_s)
        process = subprocess.run(
            command(store, run, devices=2, micro_batch_size=2, stop_margin_s=0.4 * ahead_s, **ENDLESS),
            env=environment(SLURM_JOB_ID="1", SLURM_JOB_END_TIME=str(end)), capture_output=True, text=True, timeout=250,
        )  # fmt: skip
        ended = time.time()
        if "no step fits" not in process.stderr and ended < end:
            break
    assert process.returncode == 75, process.stderr
    assert ended < end
    found = re.search(r"stopped (\d+) s before the job's time limit after step (\d+), saved", process.stderr)
    assert found, process.stderr
    assert 1 <= int(found[1]) <= 0.4 * ahead_s + 12  # and twice what a step takes here
    assert (run / f"iter-{int(found[2]):08d}-ckpt.pth" / "MANIFEST.json").is_file()
    assert int(metrics(run)[-1]["step"]) == int(found[2]), "all ranks stopped at the same step"


@pytest.mark.slow
def test_a_job_that_is_too_short_is_refused(store: Path, tmp_path: Path) -> None:
    """It would save nothing, and be put back for ever."""
    done = train(store, tmp_path, expect=2, time_limit_s=30, stop_margin_s=60)
    (line,) = [line for line in done.stderr.splitlines() if "error:" in line]
    assert re.search(r"the job ends in (30|[12]?\d) s, of which 60 s are kept free to save: no step fits", line)


def test_time_that_a_save_and_a_step_need(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock of its own: steps of 4 s and a save of 10 s, a job of 100 s, 20 s of margin: it stops at 52 s."""
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    flag = object.__new__(StopFlag)  # without its thread and the block on this process's signals
    flag.received, flag.began = None, 0.0
    stop = StopRequest(flag, StopSettings(time_limit_s=100, stop_margin_s=20))
    assert not stop.out_of_time(0.0)
    now = 30.0  # the first step compiles
    assert not stop.out_of_time(0.0)
    assert stop.needed_s() == 20
    stop.note_save(10)
    edges = []
    for edge in (44.0, 48.0, 52.0):
        now = edge
        edges.append(stop.out_of_time(0.0))
    assert stop.needed_s() == 20 + 2 * (10 + 4)
    assert edges == [False, False, True]


def test_time_that_a_validation_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of 4 s, saves of 10 s, a validation of 15 s: it is only begun where it fits, and left where it does not."""
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    flag = object.__new__(StopFlag)
    flag.received, flag.began = None, 0.0
    stop = StopRequest(flag, StopSettings(time_limit_s=100, stop_margin_s=20))
    for edge in (0.0, 4.0, 8.0):
        now = edge
        stop.out_of_time(0.0)
    stop.note_save(10)
    stop.note_pause("validate", 15)
    assert stop.needed_s() == 20 + 2 * (10 + 4)
    assert stop.needed_s(["validate"]) == 20 + 2 * (10 + 4) + 15
    now = 40.0
    assert (stop.out_of_time(0.0), stop.out_of_time(0.0, ["validate"])) == (False, True)
    now = 59.0
    assert not stop.must_save_now()
    now = 60.0  # 20 of margin and twice a save are left
    assert stop.must_save_now()


@pytest.mark.distributed
def test_a_port_that_another_run_has_is_one_clear_line(store: Path, tmp_path: Path) -> None:
    """Two runs at once with the same MASTER_PORT: the first goes on, the second says what to do (fault case 12)."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    shared = environment(MASTER_PORT=str(port))
    first = subprocess.Popen(
        command(store, tmp_path / "a", devices=2, micro_batch_size=2, **ENDLESS), env=shared, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    while not (tmp_path / "a/metrics.csv").exists():
        assert first.poll() is None
        time.sleep(0.05)
    second = subprocess.run(
        command(store, tmp_path / "b", devices=2, micro_batch_size=2), env=shared, capture_output=True, text=True,
        timeout=240,
    )  # fmt: skip
    assert second.returncode == 2
    (line,) = [line for line in second.stderr.splitlines() if " INFO " not in line]
    assert re.search(rf"error: port {port} of \S+, where the ranks would meet, cannot be used \(Address already", line)
    steps = len(metrics(tmp_path / "a"))
    while len(metrics(tmp_path / "a")) < steps + 3:
        assert first.poll() is None
        time.sleep(0.05)
    first.send_signal(signal.SIGTERM)
    assert first.wait(timeout=240) == 0
