"""AdamW (arXiv:1711.05101) whose update kernel also clips the gradients, or skips the update.

fp32 weights use PyTorch's fused kernel. bf16 weights use stochastic rounding (rounding.py), and so do their second
moments: with beta2 near 1, their updates are below half an ulp too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lit_gpt.train.rounding import hash_start, hashed, random_bits, shifted, stochastic_round

MOMENTS = ("exp_avg", "exp_avg_sq")


class AdamW(torch.optim.AdamW):
    """PyTorch's fused AdamW: one kernel for each parameter group."""

    grad_scale: Tensor | None = None
    """The kernel divides gradients by it, which saves a pass over them. Set during a step only."""
    found_inf: Tensor | None = None
    """If it is 1, the kernel changes neither weights nor moments nor the count of updates. Set during a step only."""

    def __init__(self, groups: list[dict[str, Any]], *, compiled: bool = False, **settings: Any) -> None:
        """compiled: whether torch.compile makes the kernels that are not PyTorch's own."""
        super().__init__(groups, **settings)
        self._starts: dict[Tensor, Tensor] = {}

    def make_state(self) -> None:
        """Give the weights that have no state yet PyTorch's, all 0, which it would make at the first update."""
        for weight in (weight for group in self.param_groups for weight in group["params"]):
            if weight not in self.state:
                self.state[weight] = zero_state(weight, *MOMENTS)

    @torch.no_grad()
    def step_clipped(self, norm: Tensor, max_norm: float, skip: Tensor) -> None:
        """Update by the gradients, scaled down to global 2-norm max_norm (0: no clipping); no update if skip is 1.

        norm (the gradients' global 2-norm) and skip: scalars on the device, so that the host need not wait; the same on
        every rank.
        """
        self.grad_scale = ((norm.float() + 1e-6) / max_norm).clamp(min=1.0) if max_norm > 0 else None
        self.found_inf = skip
        self.step()
        self.grad_scale = self.found_inf = None

    def _start(self, weight: Tensor) -> Tensor:
        """Hash input of this rank's first element of the weight; int32 scalar on the device."""
        if weight not in self._starts:
            self._starts[weight] = hash_start(weight, len(self._starts))
        return self._starts[weight]


class RoundingAdamW(AdamW):
    """For bf16 weights and moments; the optimizer state has PyTorch's keys.

    compiled: one kernel for each weight, compiled once for each of the half dozen shapes of a model's weights.
    """

    def __init__(self, groups: list[dict[str, Any]], *, compiled: bool, **settings: Any) -> None:
        super().__init__(groups, compiled=compiled, **settings)
        self._update: Callable[..., None] = rounding_update
        if compiled:
            self._update = torch.compile(rounding_update, fullgraph=True, dynamic=False)
        # From the start: to load a state, PyTorch would make moments by a step with gradients of the weights' dtype,
        # and weights whose gradients are fp32 refuse those.
        self.make_state()

    @torch.no_grad()
    @torch.profiler.record_function("Optimizer.step#RoundingAdamW")  # a profiler event as PyTorch's optimizers have it
    def step_clipped(self, norm: Tensor, max_norm: float, skip: Tensor) -> None:
        clip = clipping_factor(norm, max_norm)
        weights = [w for group in self.param_groups for w in group["params"] if w.grad is not None]
        counts = [self.state[weight]["step"] for weight in weights]
        torch._foreach_add_(counts, [1 - skip] * len(counts))  # a list of tensors: with a number, the host would wait
        count = counts[0]  # the same for all weights
        draw = hashed(count.int())
        for group in self.param_groups:
            lr, (beta1, beta2) = group["lr"], group["betas"]
            rate, correction = lr / (1 - beta1**count), (1 - beta2**count).rsqrt()
            keep = torch.full((), 1 - lr * group["weight_decay"], device=skip.device)
            for weight in group["params"]:
                if weight.grad is not None:
                    state = self.state[weight]
                    shards = [local_shard(x) for x in (weight, weight.grad, state["exp_avg"], state["exp_avg_sq"])]
                    scalars = self._start(weight), draw, clip, rate, correction, keep, skip
                    self._update(*shards, *scalars, betas=group["betas"], eps=group["eps"])


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
    """Update weight, mean and square (n,) bf16 in place by gradient * clip, unless skip is 1.

    Scalars are on the device, so that one compilation serves all steps. start, draw: int32; their sum is the hash input
    of the first element. rate: the learning rate divided by the first moment's bias correction. correction: 1 divided
    by the square root of the second moment's. keep: the share of a weight that weight decay leaves.
    """
    w, g, m, v = (x.float() for x in (weight, gradient, mean, square))
    g = g * clip
    m = m + (1 - betas[0]) * (g - m)
    v = betas[1] * v + (1 - betas[1]) * g * g
    w = w * keep - rate * m / (v.sqrt() * correction + eps)
    random = random_bits(weight.numel(), start, draw)
    rounded = stochastic_round(w, random), m.bfloat16(), stochastic_round(v, shifted(random, 16))
    for old, new in zip((weight, mean, square), rounded, strict=True):
        old.copy_(torch.where(skip == 0, new, old))


def zero_state(weight: Tensor, *names: str) -> dict[str, Tensor]:
    """The state of a weight before its first update: a count, and these tensors of its shape."""
    moments = {name: torch.zeros_like(weight, requires_grad=False) for name in names}
    return {"step": torch.zeros((), device=weight.device)} | moments


def local_shard(x: Tensor) -> Tensor:
    """This rank's shard, flat."""
    return (x.to_local() if isinstance(x, DTensor) else x).detach().view(-1)


def clipping_factor(norm: Tensor, max_norm: float) -> Tensor:
    """What scales gradients of global 2-norm `norm` down to max_norm (0: no clipping)."""
    norm = norm.float()
    return (max_norm / (norm + 1e-6)).clamp(max=1.0) if max_norm > 0 else torch.ones_like(norm)
