"""A real Slurm on loopback (tests/cluster/start_slurm.sh), jobs of the real batch script there, and what they do."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support.programs import ROOT, environment
from tests.support.training import command, metrics

START_SLURM = ROOT / "tests/cluster/start_slurm.sh"
CANNOT = 3  # start_slurm.sh and install_apptainer.sh: not on this machine
SETTINGS = dict(micro_batch_size=2, max_steps=60, max_epochs=2, save_interval_steps=10, eval_interval_steps=30)
"""Of a run on two ranks: some seconds long."""


@contextmanager
def running_slurm(nodes: int = 1) -> Iterator[Path]:
    """The configuration of a Slurm that runs meanwhile; skips where there can be none."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    try:
        started = subprocess.run(
            ["bash", START_SLURM, folder],
            env=environment(NODES=str(nodes)),
            capture_output=True,
            text=True,
            timeout=400,
        )
        if started.returncode == CANNOT:
            pytest.skip(started.stderr.strip().splitlines()[-1])
        assert started.returncode == 0, started.stderr
        yield folder / "slurm.conf"
    finally:
        subprocess.run(["bash", START_SLURM, folder, "stop"], env=environment(), check=True, timeout=120)
        shutil.rmtree(folder)


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


def submit(
    slurm: Path, store: Path, folder: Path, *flags: str, site: str | None = None, variables: Mapping[str, str] = {},
    **settings: object,
) -> Job:  # fmt: skip
    """sbatch of the real script; only the resources differ from what it asks for itself.

    site: text of the site file; without it, this Python and the debug model's recipe. variables: of the environment.
    """
    python, _, *arguments = command(store, folder / "run", **SETTINGS | settings)
    debug = f"export PYTHON='{python}' CONFIG='{ROOT}/pretrain/configs/debug.yaml'\n"
    (folder / "env.sh").write_text(debug if site is None else site)
    env = environment(SLURM_CONF=str(slurm), CLUSTER_ENV=str(folder / "env.sh"), **variables)
    resources = ["--gres=none", "--ntasks-per-node=2", "--cpus-per-task=1", "--time=10", f"--output={folder}/%x-%j.log"]
    sbatch = ["sbatch", "--parsable", *resources, *flags, str(ROOT / "cluster/exec/train_fabric.sh"), *arguments]
    done = subprocess.run(sbatch, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    number = done.stdout.strip()
    return Job(number, folder / f"llammlein-{number}.log", folder / "run", env)


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
