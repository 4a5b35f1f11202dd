"""The run's optimizer: parameter groups, the learning rate as a pure function of the step, and the gradient norm."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lit_gpt.checkpoint.record import Checkpoint
from lit_gpt.cli import BadInput
from lit_gpt.model.gpt import GPT
from lit_gpt.train.adamw import AdamW, RoundingAdamW
from lit_gpt.train.muon import Matrix, Muon, RoundingMuon
from lit_gpt.train.settings import OptimizerSettings

log = logging.getLogger(__name__)


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


def parameter_groups(model: nn.Module, weight_decay: float, apart: Collection[Tensor] = ()) -> list[dict[str, object]]:
    """Two groups for AdamW, without the weights `apart`: matrices have weight decay, vectors (the norms' weights) have
    none."""
    parameters = [p for p in model.parameters() if p.requires_grad and p not in apart]
    matrices = [p for p in parameters if p.dim() >= 2]
    vectors = [p for p in parameters if p.dim() < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def make_optimizer(model: nn.Module, settings: OptimizerSettings, *, compiled: bool) -> AdamW:
    """The optimizer for the dtype of the model's weights; TrainStep sets the learning rate at each step.

    compiled: whether torch.compile compiles Muon's updates and AdamW's of bf16 weights; those of fp32 weights are
    PyTorch's kernel.
    """
    adam: dict[str, Any] = dict(lr=settings.learning_rate, betas=(settings.beta1, settings.beta2), eps=1e-8, fused=True)
    adam |= dict(compiled=compiled)
    rounding = next(model.parameters()).dtype == torch.bfloat16
    if settings.optimizer == "adamw":
        return (RoundingAdamW if rounding else AdamW)(parameter_groups(model, settings.weight_decay), **adam)
    inner = getattr(model, "module", model)
    assert isinstance(inner, GPT)
    hidden = dict(inner.hidden_matrices())
    options = dict(momentum=settings.muon_momentum, cautious=settings.muon_cautious_weight_decay)
    groups: list[dict[str, Any]] = [{"params": list(hidden), "weight_decay": settings.weight_decay, **options}]
    groups += parameter_groups(model, settings.weight_decay, hidden)
    matrices = [Matrix(weight, first, rows) for weight, parts in hidden.items() for first, rows in _stacked(parts)]
    log.info("optimizer: Muon for %d matrices in %d weights, AdamW for the rest", len(matrices), len(hidden))
    return (RoundingMuon if rounding else Muon)(groups, matrices, dtype=inner.compute_dtype, **adam)


def require_same_optimizer(start: Checkpoint, settings: OptimizerSettings) -> None:
    """Raise BadInput if the checkpoint holds another optimizer's state; an imported model's holds none."""
    saved = start.facts["settings"]
    then = saved.get("optimizer", "adamw") if saved else settings.optimizer
    if then != settings.optimizer:
        raise BadInput(
            f"--optimizer {settings.optimizer}: {start.path} was trained by {then}, whose state {settings.optimizer} "
            f"cannot take. Go on with --optimizer {then}; or begin a new run from its weights, exported by "
            "scripts/create.sh and imported by scripts/convert_hf_checkpoint.py"
        )


def _stacked(parts: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(first row, rows) of matrices stacked in one."""
    return zip(accumulate(parts, initial=0), parts, strict=False)


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
