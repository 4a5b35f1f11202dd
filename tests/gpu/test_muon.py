"""Muon on a GPU, compiled: what the CPU computes, without waiting for the device, in the memory that the plan says."""

from __future__ import annotations

import pytest
import torch

from lit_gpt.config import Config
from lit_gpt.model.gpt import GPT, initialize
from lit_gpt.train.muon_plan import working_numbers
from lit_gpt.train.optimizer import gradient_norm, make_optimizer
from tests.train.test_muon import MUON, make_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.usefixtures("no_waiting")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_against_the_cpu(dtype: torch.dtype) -> None:
    """Four updates of fp32 or bf16 weights, the third of them skipped. In bf16 the directions of the smallest singular
    values are noise, which differs."""
    start = make_model(dtype, torch.bfloat16)
    ours, theirs = make_model(dtype, torch.bfloat16).cuda(), make_model(dtype, torch.bfloat16)
    for model in (ours, theirs):
        device = model.lm_head.weight.device
        optimizer = make_optimizer(model, MUON, compiled=device.type == "cuda")
        for step in range(4):
            generator = torch.Generator().manual_seed(step)
            for weight in model.parameters():
                gradient = torch.randn(weight.shape, generator=generator)
                weight.grad = torch.full_like(gradient, torch.nan if step == 2 else 0).add_(gradient).to(weight)
            skip = torch.tensor(float(step == 2), device=device)
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error" if step and device.type == "cuda" else 0)
            optimizer.step_clipped(gradient_norm(model.parameters()), 1.0, skip)
            torch.cuda.set_sync_debug_mode(0)
    for name, weight in start.named_parameters():
        if name.startswith("transformer.h.") and weight.dim() == 2:
            moved, by_the_cpu = (model.get_parameter(name).cpu().float() - weight.float() for model in (ours, theirs))
            assert (moved - by_the_cpu).norm() < 0.1 * by_the_cpu.norm(), name


def test_the_memory_of_an_update() -> None:
    """Of 120M: beside weights, gradients and state no more than the plan's."""
    config = Config.from_name("LLaMmlein_120M")
    with torch.device("cuda"):
        model = GPT(config, compute_dtype=torch.bfloat16)
    initialize(model, 1)
    optimizer = make_optimizer(model, MUON, compiled=True)
    for _ in range(2):
        for weight in model.parameters():
            weight.grad = torch.full_like(weight, 1e-3)
        norm, skip = gradient_norm(model.parameters()), torch.zeros((), device="cuda")
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        optimizer.step_clipped(norm, 1.0, skip)
    beside = torch.cuda.max_memory_allocated() - before
    assert 0.5 * 2 * working_numbers(config, 1) < beside < 1.1 * 2 * working_numbers(config, 1)
