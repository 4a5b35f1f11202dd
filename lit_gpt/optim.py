"""The optimizer's parts: parameter groups, AdamW, the learning rate as a pure function of the step, and clipping."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lit_gpt.args import Settings


def learning_rate(step: int, settings: Settings) -> float:
    """Learning rate of update number `step`, counted from 0: linear warm-up, then the schedule that settings name."""
    peak, last = settings.learning_rate, settings.max_steps - 1
    if step < settings.warmup_steps:
        return peak * (step + 1) / settings.warmup_steps
    if settings.lr_schedule == "constant":
        return peak
    decay_from = (
        settings.warmup_steps if settings.lr_schedule == "cosine" else settings.max_steps - settings.decay_steps
    )
    progress = min(max(step - decay_from, 0) / max(last - decay_from, 1), 1.0)
    if settings.lr_schedule == "cosine":
        return settings.min_lr + (peak - settings.min_lr) * (1 + math.cos(math.pi * progress)) / 2
    return peak + (settings.min_lr - peak) * progress


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Two groups for AdamW: matrices decay, vectors (the norms) do not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in parameters if p.dim() >= 2]
    vectors = [p for p in parameters if p.dim() < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


class AdamW(torch.optim.AdamW):
    """AdamW (arXiv:1711.05101) in one fused kernel a group, which also clips, or leaves all as it is."""

    grad_scale: Tensor | None = None
    """The kernel divides gradients by it: a pass over them less than scaling them beforehand."""
    found_inf: Tensor | None = None
    """Where it is 1, weights, moments and their count of updates stay, whatever the gradients hold."""

    @torch.no_grad()
    def step_clipped(self, norm: Tensor, max_norm: float, skip: Tensor) -> None:
        """Update by gradients of global 2-norm `norm`, scaled down to max_norm (0: never); not at all where skip is 1.

        norm and skip are scalars on the device, the same on every rank: the host decides nothing and waits for nothing.
        """
        self.grad_scale = ((norm.float() + 1e-6) / max_norm).clamp(min=1.0) if max_norm > 0 else None
        self.found_inf = skip
        self.step()
        self.grad_scale = self.found_inf = None


def make_optimizer(model: nn.Module, settings: Settings) -> AdamW:
    """The run's optimizer; the training loop sets the learning rate each step."""
    return AdamW(
        parameter_groups(model, settings.weight_decay),
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        eps=1e-8,
        fused=True,
    )


@torch.no_grad()
def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Global 2-norm of all gradients over all ranks, a scalar on the device; not finite if any gradient is not."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None], foreach=True)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
