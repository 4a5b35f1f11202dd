"""Kernels of other packages are tried before they are chosen.

A wheel that was built for another torch, CUDA or GPU imports, and fails (or computes something else) at the first step.
Costs: what a package compiles for the trial, it need not compile in the first step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

TOLERANCE = 0.05
"""Relative error of outputs and gradients; 16-bit kernels that are right stay below 0.01."""
_SAID = 200


def why_kernels_fail(
    compute: Callable[..., Tensor], reference: Callable[..., Tensor], shapes: Sequence[tuple[int, ...]], of: Tensor
) -> str | None:
    """Why `compute` is not to be used, in words for a user; None if its output and gradients are those of `reference`.

    Both take tensors of `shapes`: `compute` in the type of the empty tensor `of`, `reference` in fp32, on its device.
    """
    generator = torch.Generator(of.device).manual_seed(0)  # not the run's own
    inputs = [torch.randn(shape, generator=generator, device=of.device).to(of.dtype) for shape in shapes]
    wanted = _with_gradients(reference, [x.float() for x in inputs])
    try:
        got = _with_gradients(compute, inputs)
    except Exception as error:  # noqa: BLE001 - a package raises whatever it likes on a GPU that it does not fit
        said = " ".join(str(error).split())[:_SAID]
        return f"its kernels fail here with torch {torch.__version__}, {type(error).__name__}: {said}"
    worst = max(((a.float() - b).norm() / b.norm()).item() for a, b in zip(got, wanted, strict=True))
    if worst <= TOLERANCE:
        return None
    return f"its kernels compute wrong values here with torch {torch.__version__} (relative error {worst:.2g})"


def _with_gradients(compute: Callable[..., Tensor], inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """The output, and the gradients of the sum of its squares."""
    inputs = [x.requires_grad_() for x in inputs]
    with torch.enable_grad():
        out = compute(*inputs)
        return (out.detach(), *torch.autograd.grad(out.float().square().sum(), inputs))
