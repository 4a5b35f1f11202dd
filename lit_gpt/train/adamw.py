"""AdamW (arXiv:1711.05101) that also clips, or leaves all as it is, where it reads and writes weights anyway.

Weights of fp32 take PyTorch's fused kernel. Weights of bf16 are rounded up or down at random, with the chances that
keep their mean (arXiv:2010.06192): rounded to the nearest, an update of less than half of a weight's last bit would
always be lost, and so most of a warm-up and all weight decay (docs/benchmarks.md). So are their second moments, of
which a beta2 near 1 changes less than half of the last bit as well.

Chance is a hash of the weight's number, how often it was updated, and the element's place in the whole weight: a
repetition and a resumed run round alike, and so do all numbers of processes. No generator, nothing to save.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


class AdamW(torch.optim.AdamW):
    """One fused kernel a group."""

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


class RoundingAdamW(AdamW):
    """For weights and moments of bf16, in PyTorch's state.

    Compiled, one kernel a weight, made once for each of the half dozen sizes that a model's weights have.
    """

    def __init__(self, groups: list[dict[str, Any]], *, compiled: bool, **settings: Any) -> None:
        super().__init__(groups, **settings)
        self._update: Callable[..., None] = rounding_update
        if compiled:
            self._update = torch.compile(rounding_update, fullgraph=True, dynamic=False)
        self._starts: dict[Tensor, Tensor] = {}

    @torch.no_grad()
    @torch.profiler.record_function("Optimizer.step#RoundingAdamW")  # as PyTorch's own say it to the profiler
    def step_clipped(self, norm: Tensor, max_norm: float, skip: Tensor) -> None:
        clip = (max_norm / (norm.float() + 1e-6)).clamp(max=1.0) if max_norm > 0 else torch.ones_like(skip)
        weights = [w for group in self.param_groups for w in group["params"] if w.grad is not None]
        for weight in weights:
            if not self.state[weight]:
                moments = {"exp_avg": torch.zeros_like(weight), "exp_avg_sq": torch.zeros_like(weight)}
                self.state[weight] = {"step": torch.zeros((), device=weight.device)} | moments
        counts = [self.state[weight]["step"] for weight in weights]
        torch._foreach_add_(counts, [1 - skip] * len(counts))  # one tensor instead of the list: the host would wait
        count = counts[0]  # one for all, which are updated together
        draw = _hash(count.int())
        for group in self.param_groups:
            lr, (beta1, beta2) = group["lr"], group["betas"]
            rate, correction = lr / (1 - beta1**count), (1 - beta2**count).rsqrt()
            keep = torch.full((), 1 - lr * group["weight_decay"], device=skip.device)
            for weight in group["params"]:
                if weight.grad is not None:
                    state = self.state[weight]
                    parts = [_part(x) for x in (weight, weight.grad, state["exp_avg"], state["exp_avg_sq"])]
                    scalars = self._start(weight), draw, clip, rate, correction, keep, skip
                    self._update(*parts, *scalars, betas=group["betas"], eps=group["eps"])

    def _start(self, weight: Tensor) -> Tensor:
        """Where this rank's first element of the weight is in the row of chances; int32 on the device."""
        if weight not in self._starts:
            number = torch.full((), len(self._starts), dtype=torch.int32, device=weight.device)
            self._starts[weight] = _hash(_hash(number) + 1) + _first_element(weight)
        return self._starts[weight]


def rounding_update(
    weight: Tensor,
    gradient: Tensor,
    mean: Tensor,
    square: Tensor,
    start: Tensor,
    draw: Tensor,
    clip: Tensor,
    rate: Tensor,
    correction: Tensor,
    keep: Tensor,
    skip: Tensor,
    *,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """Update in place weight, mean and square (n,) bf16 by gradient * clip, unless skip is 1.

    Scalars on the device, so that one compilation serves all steps: where the weight's chances begin and what this
    update adds to it, int32; the learning rate over the first moment's bias correction, and 1 over the root of the
    second's; what weight decay keeps of a weight.
    """
    w, g, m, v = (x.float() for x in (weight, gradient, mean, square))
    g = g * clip
    m = m + (1 - betas[0]) * (g - m)
    v = betas[1] * v + (1 - betas[1]) * g * g
    w = w * keep - rate * m / (v.sqrt() * correction + eps)
    index = torch.arange(weight.numel(), dtype=torch.int32, device=weight.device)
    chance = _hash(index + (start + draw))
    rounded = round_at_random(w, chance), m.bfloat16(), round_at_random(v, _shifted(chance, 16))
    for old, new in zip((weight, mean, square), rounded, strict=True):
        old.copy_(torch.where(skip == 0, new, old))


def round_at_random(x: Tensor, chance: Tensor) -> Tensor:
    """x fp32 to bf16, up or down by the 16 lower bits of chance (int32): up as often as x is close to the upper one."""
    return ((x.view(torch.int32) + (chance & 0xFFFF)) & ~0xFFFF).view(torch.float32).bfloat16()


def _hash(x: Tensor) -> Tensor:
    """Of int32, as int32: each bit of x changes each bit of it half of the time (the constants: Chris Wellons's
    "lowbias32", https://nullprogram.com/blog/2018/07/31/)."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B - (1 << 32))):
        x = (x ^ _shifted(x, shift)) * factor
    return x ^ _shifted(x, 16)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """To the right, with zeros from the left."""
    return (x >> bits) & ((1 << (32 - bits)) - 1)


def _part(x: Tensor) -> Tensor:
    """This rank's part, flat."""
    return (x.to_local() if isinstance(x, DTensor) else x).detach().view(-1)


def _first_element(weight: Tensor) -> int:
    """Where in the whole weight this rank's part begins; FSDP shards by rows, as torch.chunk cuts."""
    if not isinstance(weight, DTensor):
        return 0
    rows, row = weight.shape[0], weight[0:1].numel()
    for dim, placement in enumerate(weight.placements):
        if placement.is_shard():
            ranks, rank = weight.device_mesh.size(dim), weight.device_mesh.get_local_rank(dim)
            return min(rank * -(-rows // ranks), rows) * row
    return 0
