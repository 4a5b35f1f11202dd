"""Importing Fabric does not import lightning's Trainer, which is still there for those who ask for it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.programs import ROOT, environment, run_program
from tests.support.training import command, make_store

CODE = """
import sys
from pathlib import Path
from lit_gpt.launch.fabric import Fabric
REST = {"lightning.pytorch", "scipy", "matplotlib", "transformers", "torchmetrics.functional"}
print(sorted(REST & set(sys.modules)))
from lightning import Trainer
import lightning, lightning.fabric, torchmetrics
print(Trainer.__module__, lightning.Fabric is Fabric, issubclass(torchmetrics.MeanMetric, torchmetrics.Metric))
"""


@pytest.mark.slow
def test_the_rest_of_lightning_is_loaded_only_when_asked_for() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE], cwd=ROOT, env=environment(), capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == ["[]", "lightning.pytorch.trainer.trainer True True"]


@pytest.mark.parametrize(
    "variables",
    [
        {"RANK": "x"},
        {"LOCAL_RANK": ""},
        {"SLURM_PROCID": "1,2"},
        {"TORCHELASTIC_RUN_ID": "x", "RANK": "x", "WORLD_SIZE": "2"},
    ],
)
def test_a_rank_that_is_no_number_is_one_line(tmp_path: Path, variables: dict[str, str]) -> None:
    """Fabric would read it when it is imported, and end in a traceback."""
    flags = command(make_store(tmp_path), tmp_path / "run")
    done = run_program(flags, env=environment(**variables), fresh=True)
    name, value = next((name, value) for name, value in variables.items() if "RANK" in name or "PROCID" in name)
    assert done.returncode == 2, done.stderr
    assert f"error: {name}={value} in the environment is not a number: unset it" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()
