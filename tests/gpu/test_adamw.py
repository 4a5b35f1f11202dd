"""The update of bf16 weights, compiled on a GPU, compared with the same function uncompiled on the CPU."""

from __future__ import annotations

import pytest
import torch

from lit_gpt.train.adamw import RoundingAdamW
from tests.train.test_adamw import ADAM, random

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_against_the_cpu() -> None:
    """Arithmetic may differ in fp32's last bits: then a weight in some hundreds is rounded to the other side."""
    shapes = ((3000, 70), (4096,))
    ours, theirs = (
        [random(*shape, seed=1).to(device).requires_grad_() for shape in shapes] for device in ("cuda", "cpu")
    )
    for weights in (ours, theirs):
        groups = [{"params": weights[:1], "weight_decay": 0.1}, {"params": weights[1:], "weight_decay": 0.0}]
        optimizer = RoundingAdamW(groups, compiled=weights[0].is_cuda, **ADAM)
        for step in range(3):
            for weight in weights:
                weight.grad = random(*weight.shape, seed=step).to(weight.device)
            skip = torch.tensor(float(step == 1), device=weights[0].device)
            optimizer.step_clipped(torch.tensor(400.0, device=weights[0].device), 1.0, skip)
    for a, b in zip(ours, theirs, strict=True):
        assert (a.cpu() != b).float().mean() < 0.01
        torch.testing.assert_close(a.cpu(), b, rtol=2**-6, atol=1e-3)
