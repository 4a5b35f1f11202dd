"""The attention benchmark on a CPU, where only the `torch` backend runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lit_gpt.bench.bench_attention import REFERENCE_ROWS, RESULTS, Call, reference, relative
from lit_gpt.data.loader import full_rows
from lit_gpt.model.attention import BACKENDS
from tests.support.programs import run_program

PROGRAM = Path(__file__).parents[2] / "scripts" / "benchmark_attention.py"
ROWS, TOKENS = 3, 64


def benchmark(*flags: str) -> subprocess.CompletedProcess[str]:
    return run_program([sys.executable, PROGRAM, "--accelerator", "cpu", "--repetitions", "1", "--rows", "3", *flags])


def test_a_line_for_each_layout_and_backend() -> None:
    done = benchmark()
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["backend"] for line in lines if "skipped" in line] == [name for name in BACKENDS if name != "torch"]
    packed, whole = (line for line in lines if "skipped" not in line)
    assert (packed["layout"], whole["layout"], whole["segments"]) == ("documents", "whole rows", 3)
    # debug: width 128, rows of 256; two products forward and five backward, each 2 D operations a pair
    assert whole["tflops"] == pytest.approx(7 * 128 * 3 * 256**2 / whole["value"] / 1e9, rel=2e-3)
    for line in (packed, whole):
        assert set(line["error"]) == set(RESULTS)
        assert all(1e-4 < error < 1e-2 for error in line["error"].values())  # bf16 has 8 bits
        assert line["forward_ms"] > 0  # one call on a machine that others use: no order of times is sure


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--rows", "0"), "--rows 0: must be at least 1"),
        (("--size", "2B"), "unknown model_name '2B'"),
        (("--backend", "fa9"), "unknown attention 'fa9'"),
        (("--backend", "fa2"), "--attention fa2 cannot run here"),
    ],
)
def test_bad_input(flags: tuple[str, ...], message: str) -> None:
    done = benchmark(*flags)
    assert done.returncode == 2
    *before, last = done.stderr.strip().splitlines()
    assert message in last
    assert not before or "loading PyTorch" in before[0]
    assert len(before) <= 1


def batch() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(ROWS, TOKENS, heads, 8, generator=generator) for heads in (4, 2, 2, 4)]


def test_the_reference_is_the_beginning_of_the_whole_batch() -> None:
    """In fp32 both sides compute the same, so what is compared is the cut after REFERENCE_ROWS rows."""
    q, k, v, d_out = batch()
    edges = torch.tensor([0, 5, 64, 100, 128, 150, 192, 192], dtype=torch.int32)
    got = Call(q, k, v, edges, "torch").results(d_out)
    for name, a, b in zip(RESULTS, got, reference(q, k, v, d_out, edges), strict=True):
        assert a.shape[0] == REFERENCE_ROWS
        assert relative(a, b) < 1e-6, name


def test_a_backend_that_ignores_documents_shows_in_the_errors() -> None:
    q, k, v, d_out = batch()
    edges = torch.tensor([0, 5, 64, 100, 128, 192], dtype=torch.int32)
    wrong = Call(q, k, v, full_rows(ROWS, TOKENS), "torch").results(d_out)
    for name, a, b in zip(RESULTS, wrong, reference(q, k, v, d_out, edges), strict=True):
        assert relative(a, b) > 0.1, name
