"""The real batch script on a real Slurm: what signals, the time limit, a dead rank and scancel do to two ranks.

Slurm is one node on loopback (start_slurm.sh), installed by the tests if they run as root on Debian; else they skip and
say why. The file takes four to five minutes on two cores.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support.programs import ROOT, environment
from tests.support.training import SMALL, command, metrics, seen_rows, train

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

START_SLURM = ROOT / "tests/cluster/start_slurm.sh"
CANNOT = 3  # start_slurm.sh: not on this machine
SETTINGS = dict(micro_batch_size=2, max_steps=60, max_epochs=2, save_interval_steps=10, eval_interval_steps=30)
ROWS_A_STEP = int(str(SMALL["global_batch_size"]))


@pytest.fixture(scope="module")
def slurm() -> Iterator[Path]:
    """The configuration of a running Slurm, which ends with the module."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    try:
        started = subprocess.run(
            ["bash", START_SLURM, folder], env=environment(), capture_output=True, text=True, timeout=400
        )
        if started.returncode == CANNOT:
            pytest.skip(started.stderr.strip().splitlines()[-1])
        assert started.returncode == 0, started.stderr
        yield folder / "slurm.conf"
    finally:
        subprocess.run(["bash", START_SLURM, folder, "stop"], env=environment(), check=True, timeout=120)
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def unbroken(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run without Slurm, not interrupted."""
    out = tmp_path_factory.mktemp("unbroken")
    train(store, out, devices=2, **SETTINGS)
    return out


class Job(NamedTuple):
    """A submitted job."""

    number: str
    log: Path
    out_dir: Path
    environment: dict[str, str]

    def run(self, *command: str) -> str:
        """Output of one of Slurm's programs."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=True, timeout=60)
        return done.stdout

    def cancel(self, *flags: str) -> None:
        self.run("scancel", *flags, self.number)

    def fact(self, name: str) -> str:
        """A value of `scontrol show job`: JobState, Restarts, ExitCode."""
        found = re.search(rf"\b{name}=(\S+)", self.run("scontrol", "show", "job", self.number))
        assert found
        return found[1]

    def text(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def steps_logged(self) -> int:
        return len(metrics(self.out_dir)) if (self.out_dir / "metrics.csv").exists() else 0

    def wait(self, met: Callable[[], object], timeout_s: float = 150) -> None:
        """Until `met` holds; the job's log says why it did not."""
        deadline = time.monotonic() + timeout_s
        while not met():
            assert time.monotonic() < deadline, f"{self.fact('JobState')} after {timeout_s} s:\n{self.text()}"
            time.sleep(0.25)

    def wait_for_text(self, text: str) -> None:
        self.wait(lambda: text in self.text())

    def wait_for_state(self, *states: str) -> None:
        self.wait(lambda: self.fact("JobState") in states)


def submit(slurm: Path, store: Path, folder: Path, *flags: str, **settings: object) -> Job:
    """sbatch of the real script; only the resources differ from what it asks for itself."""
    site = folder / "env.sh"
    site.touch()
    python, _, *arguments = command(store, folder / "run", **SETTINGS | settings)
    env = environment(
        SLURM_CONF=str(slurm), CLUSTER_ENV=str(site), PYTHON=python, CONFIG=str(ROOT / "pretrain/configs/debug.yaml")
    )
    resources = ["--gres=none", "--ntasks-per-node=2", "--cpus-per-task=1", "--time=10", f"--output={folder}/%x-%j.log"]
    sbatch = ["sbatch", "--parsable", *resources, *flags, str(ROOT / "cluster/exec/train_fabric.sh"), *arguments]
    done = subprocess.run(sbatch, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    number = done.stdout.strip()
    return Job(number, folder / f"llammlein-{number}.log", folder / "run", env)


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


def rank_process(job: str, rank: int) -> int | None:
    """Process id of a rank of a job on this host, once it is Python."""
    wanted = {f"SLURM_JOB_ID={job}".encode(), f"SLURM_PROCID={rank}".encode()}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            is_rank = wanted <= set((folder / "environ").read_bytes().split(b"\0"))
            if is_rank and b"tinyllama_fabric.py" in (folder / "cmdline").read_bytes():
                return int(folder.name)
        except OSError:  # it ended while we looked
            continue
    return None


def test_killed_rank_fails_the_job_and_the_next_one_resumes(
    slurm: Path, store: Path, unbroken: Path, tmp_path: Path
) -> None:
    job = submit(slurm, store, tmp_path)
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
