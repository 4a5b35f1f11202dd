"""A rank is killed on a real Slurm of two nodes: the run starts again in its job, on the spare node."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.slurm import rank_process, running_slurm, submit
from tests.support.training import metrics, seen_rows

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture
def two_nodes() -> Iterator[Path]:
    with running_slurm(nodes=2) as configuration:
        yield configuration


def test_a_spare_node_takes_over(two_nodes: Path, store: Path, tmp_path: Path) -> None:
    """Two ranks on the first node, none on the second; each step is done once, and the job never left."""
    spare = {"SPARE_NODES": "1", "MASTER_ADDR": "127.0.0.1"}  # the nodes' names are known to Slurm alone
    job = submit(two_nodes, store, tmp_path, "--nodes=2", "--time=60", variables=spare, max_steps=40)
    job.wait(lambda: (job.out_dir / "iter-00000010-ckpt.pth").exists(), timeout_s=500)
    victim = rank_process(job.number, 1)
    assert victim
    os.kill(victim, signal.SIGKILL)
    job.wait(lambda: job.fact("JobState") in ("COMPLETED", "FAILED"), timeout_s=500)
    log = job.text()
    assert job.fact("ExitCode") == "0:0", log
    assert job.fact("Restarts") == "0"
    assert re.search(r"rank 1 on .* ended without a word .*: all ranks end", log), log
    restart = r"supervisor: rank 1 on .* ended without a word \(.*\): restart 1 of at most 3, without n1"
    assert re.search(restart, log), log
    assert "train_fabric.sh: starting the run again without n1" in log
    phases = r"s since the fault: end of the old ranks .*, launch .*, imports .*, checkpoint .*, first step "
    assert re.search(phases, log), log
    assert re.search(r"resumed from .*/iter-000000[1-5]0-ckpt\.pth", log), log
    assert [int(line["step"]) for line in metrics(job.out_dir)] == list(range(1, 41))
    assert [slot for slot, *_ in seen_rows(job.out_dir).values()] == [8 * step for step in range(40)]
    assert not list(Path.cwd().glob(f".run-report-{job.number}-*"))
