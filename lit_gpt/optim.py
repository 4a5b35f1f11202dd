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


def make_optimizer(model: nn.Module, settings: Settings) -> torch.optim.AdamW:
    """AdamW (arXiv:1711.05101) in one fused kernel a group; the training loop sets the learning rate each step."""
    return torch.optim.AdamW(
        parameter_groups(model, settings.weight_decay),
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        eps=1e-8,
        fused=True,
    )


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale gradients so that their global 2-norm is at most max_norm (0: leave them); returns the norm before.

    The norm stays on its device: nothing here waits for the GPU.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    if max_norm > 0:
        torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm
