"""The run's optimizer: parameter groups, the learning rate as a pure function of the step, and the gradient norm."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lit_gpt.train.adamw import AdamW, RoundingAdamW
from lit_gpt.train.settings import OptimizerSettings


def learning_rate(step: int, settings: OptimizerSettings) -> float:
    """Learning rate of update number `step`, counted from 0: linear warm-up, then settings.lr_schedule.

    settings.max_steps: the run's last step (run_length.py).
    """
    assert settings.max_steps is not None
    peak, lowest, last = settings.learning_rate, settings.min_lr, settings.max_steps - 1
    if step < settings.warmup_steps:
        return peak * (step + 1) / settings.warmup_steps
    if settings.lr_schedule == "constant":
        return peak
    if settings.lr_schedule == "wsd":
        decayed = max(step + 1 - (settings.max_steps - settings.decay_steps), 0)  # of decay_steps, the last one whole
        return peak + (lowest - peak) * min(decayed / settings.decay_steps, 1.0)
    if step >= last:
        return lowest
    progress = (step - settings.warmup_steps) / (last - settings.warmup_steps)  # 0 at the first step after warm-up
    return lowest + (peak - lowest) * (1 + math.cos(math.pi * progress)) / 2


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Two groups for AdamW: matrices have weight decay, vectors (the norms' weights) have none."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in parameters if p.dim() >= 2]
    vectors = [p for p in parameters if p.dim() < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def make_optimizer(model: nn.Module, settings: OptimizerSettings, *, compiled: bool) -> AdamW:
    """AdamW for the dtype of the model's weights; TrainStep sets the learning rate at each step.

    compiled: whether torch.compile compiles the update of bf16 weights; fp32 weights use PyTorch's kernel.
    """
    groups = parameter_groups(model, settings.weight_decay)
    adam: dict[str, Any] = dict(lr=settings.learning_rate, betas=(settings.beta1, settings.beta2), eps=1e-8, fused=True)
    if next(model.parameters()).dtype != torch.bfloat16:
        return AdamW(groups, **adam)
    return RoundingAdamW(groups, compiled=compiled, **adam)


@torch.no_grad()
def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """2-norm of all gradients over all ranks, as a fp32 scalar on the device; not finite if any gradient is not.

    Where ranks hold several copies of the weights, each copy sums its own norm, in an order of its own: the last bit
    may differ. All take the largest, so that they clip and judge alike. (The maximum is one of bit patterns, as
    integers: it keeps NaN, which is above infinity.) It costs an all-reduce of 4 bytes, where there are copies.

    torch.nn.utils.get_total_norm would compute the norm of bf16 gradients in bf16.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients, dtype=torch.float32)))
    if not isinstance(norm, DTensor):
        return norm
    copies = norm.device_mesh.ndim > 1 and norm.device_mesh.size(0) > 1
    norm = norm.full_tensor()
    if copies:
        bits = norm.abs().view(torch.int32)  # a NaN may have a sign
        dist.all_reduce(bits, op=dist.ReduceOp.MAX)
        norm = bits.view(torch.float32)
    return norm
