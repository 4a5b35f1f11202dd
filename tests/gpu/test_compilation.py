"""On GPUs, too, nothing is compiled after the first step: 60 steps of packed documents with three validations."""

from __future__ import annotations

import csv
import subprocess
from pathlib import Path

import pytest
import torch

from tests.support.programs import environment
from tests.support.training import command

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.timeout(300)
def test_nothing_is_compiled_after_the_first_step(store: Path, tmp_path: Path) -> None:
    run = command(
        store, tmp_path / "run", accelerator="cuda", devices=min(2, torch.cuda.device_count()), precision="bf16-mixed",
        max_steps=60, max_epochs=100, eval_interval_steps=20, save_interval_steps=1000, compile="true",
    )  # fmt: skip
    done = subprocess.run(
        run, env=environment(TORCH_LOGS="recompiles"), capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr
    with (tmp_path / "run/metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len({row["compiled_graphs"] for row in rows}) == 1, [row["compiled_graphs"] for row in rows]
    assert sum(row["val_loss"] != "" for row in rows) == 3
    after = done.stderr.split("step 1/60", 1)[1]
    assert "Recompiling" not in after
