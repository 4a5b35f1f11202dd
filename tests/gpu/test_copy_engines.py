"""Weights gathered by copy engines: the same losses as by NCCL's kernels, on two GPUs of one host."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch

from tests.support.programs import ROOT, environment

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")]


def measured(**variables: str) -> tuple[dict[str, Any], str]:
    done = subprocess.run(
        [
            sys.executable, str(ROOT / "scripts" / "benchmark_step.py"), "--size", "LLaMmlein_120M", "--rows", "8",
            "--micro_batch", "4", "--devices", "2", "--steps", "4",
        ],
        env=environment(**variables), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[0]), done.stderr


def test_same_losses() -> None:
    (by_engines, said), (by_kernels, said_of_kernels) = measured(), measured(NCCL_CTA_POLICY="0")
    assert "gathered by the GPUs' copy engines" in said
    assert "copy engines" not in said_of_kernels
    assert by_engines["loss_after_warmup"] == by_kernels["loss_after_warmup"]
