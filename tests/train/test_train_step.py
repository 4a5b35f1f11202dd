"""A step's arithmetic in bf16: gradients of micro-batches add up in fp32, and the loss's scale is not rounded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lit_gpt.bench.bench_step import StepBench
from lit_gpt.train.memory_plan import step_memory
from lit_gpt.train.resolve import resolve_for_plan
from lit_gpt.train.settings import StepSettings

SMALL = dict(
    model_name="debug", block_size=16, vocab_size=64, accelerator="cpu", devices=1, mlp="torch", max_steps=10,
    warmup_steps=1, micro_batch_size=1, train_data_dir="(random tokens)",
)  # fmt: skip


def at_the_update(bench: StepBench) -> list[Tensor]:
    """The gradients that the optimizer gets in the bench's next step."""
    found: list[Tensor] = []
    bench.optimizer.step_clipped = lambda *_, **__: found.extend(p.grad for p in bench.model.parameters())  # type: ignore
    bench.step()
    return found


def error(got: Tensor, wanted: Tensor) -> float:
    return ((got.double() - wanted).norm() / wanted.norm()).item()


@pytest.mark.slow
@pytest.mark.parametrize("float8", ["none", pytest.param("tensorwise", marks=pytest.mark.long)])
def test_micro_batches_add_up_in_fp32(float8: Any) -> None:
    """64 of them with bf16 weights, compared with the sum of their gradients in fp64. A sum in bf16 is 0.9 % off."""
    settings = StepSettings(**SMALL, precision="bf16-true", global_batch_size=64, float8=float8)
    bench = StepBench(settings, distinct_steps=1)
    parameters = list(bench.model.parameters())
    assert {p.dtype for p in parameters} == {torch.bfloat16}
    wanted = [torch.zeros(p.shape, dtype=torch.float64) for p in parameters]
    for batch in bench._steps[0]:
        bench.train_step._backward(batch, 1 / bench._targets[0])
        for total, p in zip(wanted, parameters, strict=True):
            assert p.grad is not None
            total += p.grad
            p.grad = None
    got = at_the_update(bench)
    assert max(error(a, b) for a, b in zip(got, wanted, strict=True)) < 1e-6
    planned = step_memory(bench.config, resolve_for_plan(settings), 1, 1)
    bytes_held = sum(gradient.nbytes for gradient in got)
    assert [memory.gradients for memory in (planned[0], planned[2])] == [bytes_held, bytes_held]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_one_micro_batch_costs_no_more_than_its_gradients(precision: Any) -> None:
    settings = StepSettings(**SMALL, precision=precision, global_batch_size=1)
    bench = StepBench(settings, distinct_steps=1)
    forward, _, update = step_memory(bench.config, resolve_for_plan(settings), 1, 1)
    assert (forward.gradients, update.gradients) == (0, sum(gradient.nbytes for gradient in at_the_update(bench)))


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("float8", ["none", "tensorwise"])
def test_the_loss_s_scale_is_not_rounded(precision: Any, float8: Any) -> None:
    """A scale of 1 / 3, which bf16 has 0.2 % too large: what the head hands down to the blocks is a third."""
    larger = {**SMALL, "micro_batch_size": 16, "global_batch_size": 16}
    bench = StepBench(StepSettings(**larger, precision=precision, float8=float8), distinct_steps=1)
    handed_down: list[Tensor] = []
    bench.model.module.transformer.ln_f.register_full_backward_hook(lambda _, __, d_out: handed_down.append(d_out[0]))
    for scale in (1.0, 1 / 3):
        bench.train_step._backward(bench._steps[0][0], scale)
    whole, third = (gradient.double() for gradient in handed_down)
    assert handed_down[0].dtype == torch.bfloat16
    assert ((third * whole).sum() / whole.square().sum()).item() == pytest.approx(1 / 3, rel=2e-4)
