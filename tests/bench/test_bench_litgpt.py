"""The step of litgpt that ours is measured against, on a CPU and without its compiler."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lit_gpt.bench.bench_litgpt import shape_of
from lit_gpt.config import REGISTRY
from tests.support.programs import environment

PROGRAM = Path(__file__).parents[2] / "scripts" / "benchmark_litgpt.py"
SMALL = ("--size", "debug", "--rows", "2", "--steps", "2", "--warmup", "1", "--accelerator", "cpu")


def benchmark(*flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, PROGRAM, *SMALL, *flags], env=environment(TORCH_COMPILE_DISABLE="1"), capture_output=True,
        text=True, timeout=300,
    )  # fmt: skip


def test_without_litgpt_it_says_what_to_install() -> None:
    """None in sys.modules makes Python refuse the package, as if it were not installed."""
    code = (
        "import runpy, sys; sys.modules['litgpt'] = None; del sys.argv[0]; "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(PROGRAM)], env=environment(), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert "needs litgpt, which is not installed: pip install -e '.[bench]'" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("flag", ["rows", "steps", "warmup"])
def test_counts_below_one_are_refused(flag: str) -> None:
    done = benchmark(f"--{flag}", "0")
    assert done.returncode == 2
    assert f"--{flag} 0: must be at least 1" in done.stderr


@pytest.mark.parametrize("name", REGISTRY)
def test_the_shape_is_ours(name: str) -> None:
    litgpt = pytest.importorskip("litgpt")
    with torch.device("meta"):
        model = litgpt.GPT(litgpt.Config(**shape_of(REGISTRY[name])))
    assert sum(parameter.numel() for parameter in model.parameters()) == REGISTRY[name].parameters


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_a_line(precision: str) -> None:
    pytest.importorskip("litgpt")
    done = benchmark("--precision", precision)
    assert done.returncode == 0, done.stderr
    line = json.loads(done.stdout)
    assert (line["size"], line["precision"], line["rows"], line["unit"]) == ("debug", precision, 2, "tokens/s")
    assert line["value"] == pytest.approx(2 * 256 / line["ms"] * 1e3, rel=0.01)
    assert 7 < line["loss"] < 10  # ln 4096 = 8.3
    assert line["versions"]["litgpt"]
