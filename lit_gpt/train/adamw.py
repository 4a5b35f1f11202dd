"""AdamW (arXiv:1711.05101) that also clips, or leaves all as it is, where it reads and writes weights anyway.

Weights of fp32 take PyTorch's fused kernel. Weights of bf16 take stochastic rounding, up or down with the chances that
keep the mean (arXiv:2010.06192). Rounding to nearest would lose every update below half an ulp of its weight, and with
it most of a warm-up and all weight decay (docs/benchmarks.md). Second moments are rounded in the same way: with beta2
near 1 their updates, too, are below half an ulp.

The random bits are a hash of the weight's number, the number of its updates, and the element's index in the whole
weight. So a repeated run, a resumed run and a run on another number of processes round alike, without a generator's
state to save.
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
        """Where the random bits of this rank's first element of the weight begin; int32 on the device."""
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

    Scalars are on the device, so that one compilation serves all steps. start, draw: int32, where the weight's random
    bits begin, and what this update adds to that. rate: the learning rate over the first moment's bias correction.
    correction: 1 over the root of the second's. keep: the share of a weight that weight decay leaves.
    """
    w, g, m, v = (x.float() for x in (weight, gradient, mean, square))
    g = g * clip
    m = m + (1 - betas[0]) * (g - m)
    v = betas[1] * v + (1 - betas[1]) * g * g
    w = w * keep - rate * m / (v.sqrt() * correction + eps)
    index = torch.arange(weight.numel(), dtype=torch.int32, device=weight.device)
    random = _hash(index + (start + draw))
    rounded = stochastic_round(w, random), m.bfloat16(), stochastic_round(v, _shifted(random, 16))
    for old, new in zip((weight, mean, square), rounded, strict=True):
        old.copy_(torch.where(skip == 0, new, old))


def stochastic_round(x: Tensor, random: Tensor) -> Tensor:
    """x fp32 to bf16: up with a chance of its distance, in ulps, from the lower neighbour. Uses 16 bits of `random`."""
    return ((x.view(torch.int32) + (random & 0xFFFF)) & ~0xFFFF).view(torch.float32).bfloat16()


def _hash(x: Tensor) -> Tensor:
    """Of int32, as int32: each bit of x changes each bit of it half of the time (the constants: Chris Wellons's
    "lowbias32", https://nullprogram.com/blog/2018/07/31/)."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B - (1 << 32))):
        x = (x ^ _shifted(x, shift)) * factor
    return x ^ _shifted(x, 16)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Logical shift to the right."""
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
