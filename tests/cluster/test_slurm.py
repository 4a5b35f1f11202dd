"""The real batch script on a real Slurm: what signals, the time limit, a dead rank and scancel do to two ranks.

Slurm is one node on loopback (start_slurm.sh), installed by the tests if they run as root on Debian; else they skip and
say why. The file takes four to five minutes on two cores.
"""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest

from tests.support.slurm import SETTINGS, rank_process, submit
from tests.support.training import SMALL, metrics, seen_rows, train

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

ROWS_A_STEP = int(str(SMALL["global_batch_size"]))


@pytest.fixture(scope="module")
def unbroken(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run without Slurm, not interrupted."""
    out = tmp_path_factory.mktemp("unbroken")
    train(store, out, devices=2, **SETTINGS)
    return out


def stopped_at(log: str, name: str) -> int:
    """The step after which a run was stopped by a signal, as its log says; `pytest -rP` shows the log's lines of it."""
    print("\n".join(line for line in log.splitlines() if re.search("stopped|resumed|train_fabric.sh:", line)))
    found = re.search(rf"stopped by a signal \({name}\) after step (\d+), saved", log)
    assert found, log
    return int(found[1])


def test_signals_save_requeue_and_resume(slurm: Path, store: Path, unbroken: Path, tmp_path: Path) -> None:
    """USR1 to the script before a rank can listen, then to the ranks: the third start ends like an unbroken run."""
    job = submit(slurm, store, tmp_path)
    job.wait_for_text("start 1,")
    job.wait(lambda: rank_process(job.number, 1))
    job.cancel("--batch", "--signal=USR1")
    job.wait_for_text("start 2,")
    job.wait(lambda: job.steps_logged() >= 10)
    job.cancel("--signal=USR1")
    job.wait_for_text("start 3,")
    job.wait_for_state("COMPLETED", "FAILED")
    log = job.text()
    assert job.fact("ExitCode") == "0:0", log
    assert job.fact("Restarts") == "2"
    step = stopped_at(log, "SIGUSR1")
    assert 10 <= step < 60
    done = f"step {step}, {step * ROWS_A_STEP:,} rows of the data done"
    assert f"resumed from {job.out_dir}/iter-{step:08d}-ckpt.pth: {done}" in log
    assert "(75): back into the queue" in log
    assert "(SIGUSR1) before the first step: nothing new to save" in log or "(138): back into the queue" in log
    assert f"port {10000 + int(job.number)}" in log
    assert metrics(job.out_dir) == metrics(unbroken)
    assert seen_rows(job.out_dir) == seen_rows(unbroken)


def test_preemption_saves_and_goes_on(slurm: Path, store: Path, unbroken: Path, tmp_path: Path) -> None:
    """A job that outranks ours wants the whole node: TERM to the ranks, then our job waits for it."""
    job = submit(slurm, store, tmp_path)
    job.wait(lambda: job.steps_logged() >= 10)
    job.run("sbatch", "--partition=high", "--ntasks=4", f"--output={tmp_path}/high.log", "--wrap=sleep 1")
    job.wait_for_text("start 2,")
    job.wait_for_state("COMPLETED", "FAILED")
    log = job.text()
    step = stopped_at(log, "SIGTERM")
    assert 10 <= step < 60
    assert f"resumed from {job.out_dir}/iter-{step:08d}-ckpt.pth: step {step}," in log
    assert metrics(job.out_dir) == metrics(unbroken)
    assert seen_rows(job.out_dir) == seen_rows(unbroken)


def test_killed_rank_fails_the_job_and_the_next_one_resumes(
    slurm: Path, store: Path, unbroken: Path, tmp_path: Path
) -> None:
    job = submit(slurm, store, tmp_path, variables={"RESTARTS": "0"})
    job.wait(lambda: (job.out_dir / "iter-00000010-ckpt.pth").exists())
    victim = rank_process(job.number, 1)
    assert victim
    os.kill(victim, signal.SIGKILL)
    job.wait_for_state("FAILED", "COMPLETED")
    assert job.fact("ExitCode") == "137:0", job.text()
    assert "back into the queue" not in job.text()

    again = submit(slurm, store, tmp_path)
    again.wait_for_state("COMPLETED", "FAILED")
    log = again.text()
    assert again.fact("ExitCode") == "0:0", log
    assert re.search(r"resumed from .*/iter-000000[1-5]0-ckpt\.pth: step [1-5]0,", log), log
    assert metrics(again.out_dir) == metrics(unbroken)
    assert seen_rows(again.out_dir) == seen_rows(unbroken)


def test_time_limit_requeues_and_scancel_does_not(slurm: Path, store: Path, tmp_path: Path) -> None:
    """Slurm warns the script 60 to 90 s before the limit of 120 s; nothing else stops the first start."""
    job = submit(
        slurm, store, tmp_path, "--time=2", "--signal=B:USR1@60", max_steps=1_000_000, max_epochs=1_000_000,
        save_interval_steps=1_000_000, stop_margin_s=1,
    )  # fmt: skip
    job.wait_for_text("start 2,")
    warned_at = stopped_at(job.text(), "SIGUSR1")
    assert "USR1: asking the ranks to save and stop" in job.text()
    job.wait(lambda: job.steps_logged() >= warned_at + 3)
    job.cancel()
    job.wait_for_state("CANCELLED")
    job.wait_for_text("was cancelled: saved, not put back")
    cancelled_at = stopped_at(job.text(), "SIGTERM")
    assert job.fact("JobState") == "CANCELLED"
    assert (job.out_dir / f"iter-{cancelled_at:08d}-ckpt.pth").exists()
    assert [int(line["step"]) for line in metrics(job.out_dir)] == list(range(1, cancelled_at + 1))
    first_slots = [slot for slot, *_ in seen_rows(job.out_dir).values()]
    assert first_slots == [ROWS_A_STEP * step for step in range(cancelled_at)]
