"""The step benchmark and the profile of a run, on a CPU."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lit_gpt.bench.bench_step import StepBench, packed_documents
from lit_gpt.cli import BadInput
from lit_gpt.data.loader import Batch
from lit_gpt.train.settings import StepSettings, step_range
from lit_gpt.train.train_step import TrainStep
from tests.support.programs import run_program
from tests.support.training import train

PROGRAM = Path(__file__).parents[2] / "scripts" / "benchmark_step.py"


def benchmark(*flags: str) -> subprocess.CompletedProcess[str]:
    small = ("--size", "debug", "--accelerator", "cpu", "--steps", "2", "--warmup", "1")
    return run_program([sys.executable, PROGRAM, *small, *flags])


def test_a_line_for_the_step() -> None:
    done = benchmark("--rows", "2", "--micro_batch", "1", "--precision", "bf16-true")
    assert done.returncode == 0, done.stderr
    (step,) = (json.loads(line) for line in done.stdout.splitlines())
    assert (step["what"], step["rows"], step["micro_batch"], step["unit"]) == ("step", 2, 1, "tokens/s")
    assert step["value"] > 0
    assert 7 < step["loss_after_warmup"] < 10  # ln 4096 = 8.3


def test_the_line_names_what_the_mlp_runs_on() -> None:
    done = benchmark("--rows", "1", "--float8", "tensorwise")
    assert done.returncode == 0, done.stderr
    (step,) = (json.loads(line) for line in done.stdout.splitlines())
    assert (step["float8"], step["mlp"]) == ("tensorwise", "float8")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--rows", "4", "--micro_batch", "3"), "--micro_batch 3 does not divide --rows 4"),
        (("--steps", "0"), "--steps 0: must be at least 1"),
        (("--size", "2B"), "2B"),
    ],
)
def test_bad_input(flags: tuple[str, ...], message: str) -> None:
    done = benchmark(*flags)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.slow
def test_profile_of_a_run(store: Path, tmp_path: Path) -> None:
    train(store, tmp_path, max_steps=4, profile_steps="2:4", log_interval_steps=4)
    with gzip.open(tmp_path / "profile" / "steps-2-4.trace.json.gz") as file:
        trace = json.load(file)
    names = [event.get("name") for event in trace["traceEvents"]]
    assert names.count("Optimizer.step#AdamW.step") == 2
    assert "aten::mm" in (tmp_path / "profile" / "steps-2-4.kernels.txt").read_text()


@pytest.mark.parametrize("steps", ["3", "3:", "5:5", "7:2", "a:b"])
def test_profile_steps_are_refused(steps: str) -> None:
    with pytest.raises(BadInput, match=f"--profile_steps {steps}: must be A:B"):
        step_range(steps)


def test_documents_end_at_rows_and_have_the_lengths_of_german_web_text() -> None:
    packed, document_ends = packed_documents(64, 2048, np.random.default_rng(1))
    cu_seqlens = packed.numpy()
    assert np.isin(document_ends, cu_seqlens).all()
    assert len(cu_seqlens) % 64 == 0
    assert cu_seqlens[0] == 0
    assert cu_seqlens[-1] == 64 * 2048
    assert (np.diff(cu_seqlens) >= 0).all()
    assert np.isin(np.arange(64) * 2048, cu_seqlens).all()
    inside = np.diff(cu_seqlens[: np.argmax(cu_seqlens) + 1])
    # log-normal of median 368, sigma 1.14 has mean 705; 186 documents and up to 64 cuts at rows
    assert 64 * 2048 / 705 * 0.8 < len(inside) < 64 * 2048 / 705 * 1.2 + 64


@pytest.mark.slow
def test_steps_that_update_nothing_are_no_measurement() -> None:
    settings = StepSettings(
        model_name="debug", global_batch_size=2, micro_batch_size=2, accelerator="cpu", precision="32-true",
        devices=1,
    )  # fmt: skip
    bench = StepBench(settings, distinct_steps=1)
    bench.step()
    bench.require_updates()
    with torch.no_grad():
        next(bench.model.parameters()).fill_(float("nan"))
    bench.step()
    with pytest.raises(RuntimeError, match="1 of 2 updates were skipped, their gradients were not finite"):
        bench.require_updates()


class Mark:
    """Something that a graph holds beside what the backward pass frees."""


class Marked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, mark: Mark) -> torch.Tensor:
        ctx.mark = mark
        return x.clone()

    @staticmethod
    def backward(ctx: Any, d_out: torch.Tensor) -> tuple[torch.Tensor, None]:
        return d_out, None


@pytest.mark.slow
def test_the_graph_of_a_micro_batch_is_gone_before_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = StepSettings(
        model_name="debug", global_batch_size=3, micro_batch_size=1, precision="32-true", accelerator="cpu", devices=1,
    )  # fmt: skip
    bench = StepBench(settings, distinct_steps=1)
    plain, marks = TrainStep.loss, list[weakref.ref[Mark]]()

    def loss(self: TrainStep, batch: Batch) -> torch.Tensor:
        assert not any(mark() for mark in marks)
        mark = Mark()
        marks.append(weakref.ref(mark))
        return Marked.apply(plain(self, batch), mark)

    monkeypatch.setattr(TrainStep, "loss", loss)
    bench.step()
    assert len(marks) == 3
    assert not any(mark() for mark in marks)
