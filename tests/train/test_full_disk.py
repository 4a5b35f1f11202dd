"""A whole training on a file system that fills up to its last byte and is freed again: only log lines may be lost."""

from __future__ import annotations

import contextlib
import sys
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_gpt.checkpoint.checkpoint import verified
from tests.support.programs import ROOT, run_program, start_program
from tests.support.training import command, metrics, seen_rows, small_disk

STEPS = 120
SETTINGS = dict(
    max_steps=STEPS, max_epochs=100, save_interval_steps=20, eval_interval_steps=1000, tensorboard="true",
    async_save="true", sample_interval_steps=0,
)  # fmt: skip
ALARMS = (
    "metrics.csv cannot be written",
    "steps.jsonl cannot be written",
    ".0 cannot be written",  # TensorBoard's events
    "was NOT saved",
)


def fill(file: Path) -> None:
    """Take what is free, to the last page."""
    with file.open("ab", buffering=0) as output, contextlib.suppress(OSError):
        while output.write(bytes(1 << 16)):
            pass


@pytest.mark.slow
def test_a_full_disk_that_is_freed_again(store: Path, tmp_path: Path) -> None:
    """Log lines, TensorBoard and a checkpoint fail meanwhile; at the end all are there, and verified."""
    with small_disk(tmp_path / "disk", size=40 << 20) as disk, (tmp_path / "log").open("w") as log:
        run = disk / "run"
        process = start_program(command(store, run, **SETTINGS), stderr=log)
        deadline = time.monotonic() + 120
        while not (run / "iter-00000020-ckpt.pth").exists():
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.01)
        while not all(alarm in (tmp_path / "log").read_text() for alarm in ALARMS):
            fill(disk / "others")
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        (disk / "others").unlink()
        assert process.wait(timeout=120) == 0
        said = (tmp_path / "log").read_text()
        assert "Traceback" not in said
        assert said.count("can be written again") >= 3
        *_, last, next_command = said.splitlines()
        assert f"finished at step {STEPS}" in last
        assert "next: " in next_command
        assert [int(line["step"]) for line in metrics(run)] == list(range(1, STEPS + 1))
        assert list(seen_rows(run)) == list(range(1, STEPS + 1))
        verified(run / f"iter-{STEPS:08d}-ckpt.pth")
        verify = run_program([sys.executable, ROOT / "scripts/datapoints.py", "verify", "--run_dir", run])
        assert verify.returncode == 0, verify.stdout
        events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
        events.Reload()
        losses = {int(line["step"]): float(line["loss"]) for line in metrics(run)}
        assert {e.step: e.value for e in events.Scalars("train/loss")} == pytest.approx(losses, rel=1e-6)
