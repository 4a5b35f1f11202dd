"""Importing Fabric does not import lightning's Trainer, which is still there for those who ask for it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.support.programs import ROOT, environment

CODE = """
import sys
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
