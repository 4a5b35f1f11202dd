"""build_corpus --executor slurm on a real Slurm: arrays that depend on each other, and a task that is killed."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from tests.corpus.conftest import built, made_up, write_documents
from tests.corpus.test_paragraph_dedup import bytes_of
from tests.support.programs import ROOT, environment, run_program

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

KILLS = """
import os, sys
marker = os.environ["KILLED_ONCE"]
if "slurm-task" in sys.orig_argv and os.environ["SLURM_ARRAY_TASK_ID"] == "1" and not os.path.exists(marker):
    open(marker, "w").close()
    sys.addaudithook(lambda event, arguments: event == "os.rename" and os.kill(os.getpid(), 9))
"""
"""sitecustomize.py: the first start of an array's element 1 is killed before it publishes its first file."""


def test_arrays_make_the_corpus_though_a_task_is_killed(
    slurm: Path,
    tmp_path: Path,
) -> None:
    source, out, killed = tmp_path / "in", tmp_path / "out", tmp_path / "killed"
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(KILLS)
    source.mkdir()
    for number in range(3):
        write_documents(source / f"{number}.jsonl", made_up(20, number))
    built(source, tmp_path / "whole", stages=["paragraph_dedup", "pii"], part_bytes=1)
    python_path = f"{tmp_path}/site{os.pathsep}{ROOT}"
    env = environment(SLURM_CONF=str(slurm), KILLED_ONCE=str(killed), PYTHONPATH=python_path)
    command = [
        sys.executable, ROOT / "scripts/build_corpus.py", "--source", source, "--destination_path", out, "--stages",
        "paragraph_dedup", "pii", "--part_bytes", "1", "--executor", "slurm", "--tasks", "2", "--slurm_memory_gb", "1",
        "--slurm_time", "10",
    ]  # fmt: skip
    done = run_program(command, env=env)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert "in Slurm's queue as" in done.stderr
    deadline_s = time.monotonic() + 400
    while list(out.glob("build*")):
        said = "\n".join(f"{path.name}: {path.read_text()}" for path in sorted((out / "logs").iterdir()))
        assert time.monotonic() < deadline_s, said
        time.sleep(0.5)
    logs = {path.name for path in (out / "logs").iterdir()}
    made = {name: held for name, held in bytes_of(out).items() if not name.startswith("logs/")}
    assert made == bytes_of(tmp_path / "whole")
    assert killed.exists()
    arrays = {name.rpartition("_")[0] for name in logs if name.startswith("pass-0")}
    assert len(arrays) == 2, f"the killed task ran again in an array of its own: {logs}"
    again = run_program(command, env=env)
    assert "already holds this corpus, finished" in again.stderr
