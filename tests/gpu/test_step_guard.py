"""On a GPU: bad updates change nothing, clipping scales gradients, and neither synchronizes the host."""

from __future__ import annotations

import pytest
import torch

from lit_gpt.train.optimizer import gradient_norm, make_optimizer
from lit_gpt.train.settings import StepSettings
from lit_gpt.train.step_guard import StepGuard, Verdict

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.usefixtures("no_waiting")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_skip_and_clip_without_waiting(dtype: torch.dtype) -> None:
    """Norms 2, 2, NaN, 200, 2 of 4 elements: the third and fourth are skipped; moments saw gradients of norm 1."""
    settings = StepSettings(learning_rate=0.1, spike_policy="skip", spike_window_steps=2, compile=False)
    model = torch.nn.ParameterList([torch.ones(2, 2, device="cuda", dtype=dtype)])
    optimizer = make_optimizer(model, settings, compiled=False)
    guard = StepGuard(settings, torch.device("cuda"))
    (weight,) = model
    weight.grad = torch.ones_like(weight)
    torch.cuda.synchronize()
    snapshots = []
    torch.cuda.set_sync_debug_mode("error")
    for step, value in enumerate([1.0, 1.0, float("nan"), 100.0, 1.0], 1):
        weight.grad.fill_(value)
        norm = gradient_norm(model)
        verdict = guard.judge(norm)
        optimizer.step_clipped(norm, 1.0, skip=(verdict != 0).float())
        guard.note(step, 8 * step, 8, verdict, norm)
        snapshots.append(weight.detach().clone())
    torch.cuda.set_sync_debug_mode(0)
    assert [(found.step, found.verdict) for found in guard.read()] == [(3, Verdict.NOT_FINITE), (4, Verdict.SPIKE)]
    assert not torch.equal(snapshots[0], snapshots[1])
    assert torch.equal(snapshots[1], snapshots[2])
    assert torch.equal(snapshots[1], snapshots[3])
    assert not torch.equal(snapshots[3], snapshots[4])
    assert optimizer.state[weight]["step"].item() == 3
    # the gradient average after three gradients of 0.5: 0.5 (1 - 0.9^3)
    wanted = torch.full_like(weight, 0.5 * (1 - 0.9**3))
    torch.testing.assert_close(optimizer.state[weight]["exp_avg"], wanted, rtol=1e-2, atol=0)
