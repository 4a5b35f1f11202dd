"""The MLP with SwiGLU (arXiv:2002.05202): down(silu(gate) * up), as one function of its input and its two weights.

Gate and up are halves of one weight. Computed product by product, the tensors between them (2 I and I numbers a token,
and their gradients) cross the GPU's memory several times. Two backends:

    quack   SwiGLU and its gradient are computed inside the products, while their results are in registers. Needs
            quack-kernels, which flash-attn-4 brings, a Hopper GPU, and computation in 16 bits
    torch   layer by layer; torch.compile fuses what stands between the products. Runs everywhere

The only importer of quack.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
from typing import Any

import torch
from torch import Tensor

from lit_gpt.cli import BadInput

log = logging.getLogger(__name__)

# Shapes: N tokens, C width, I MLP width.

BACKENDS = ("quack", "torch")
PACKAGE = "quack.gemm_interface"
VERSION = "0.6"
"""Of quack-kernels; its interface changes between minor versions."""
MULTIPLE = 16
"""Widths that quack's kernels read must be multiples of this."""


def choose_mlp(requested: str, device: torch.device, dtype: torch.dtype, widths: tuple[int, ...]) -> str:
    """The backend that `requested` ("auto" or a name) stands for; raises BadInput if it cannot run."""
    if requested not in ("auto", *BACKENDS):
        raise BadInput(f"unknown mlp {requested!r}. Valid: auto, {', '.join(BACKENDS)}")
    reason = _why_not_quack(device, dtype, widths)
    if requested == "quack" and reason is not None:
        raise BadInput(f"--mlp quack cannot run here: {reason}. Valid here: torch")
    chosen = "torch" if requested == "torch" or reason is not None else "quack"
    log.info("mlp: %s (asked for: %s)%s", chosen, requested, f"; not quack: {reason}" if reason else "")
    return chosen


def _why_not_quack(device: torch.device, dtype: torch.dtype, widths: tuple[int, ...]) -> str | None:
    if device.type != "cuda":
        return f"it needs a Hopper GPU, this run is on {device.type}"
    major, minor = torch.cuda.get_device_capability(device)
    if major != 9:
        return f"it was not measured on compute capability {major}.{minor}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it computes in 16 bits, this run in {dtype}"
    if any(width % MULTIPLE for width in widths):
        return f"the widths {widths} are no multiples of {MULTIPLE}"
    try:
        importlib.import_module(PACKAGE)
        version = importlib.metadata.version("quack-kernels")
    except ImportError as error:
        return f"{PACKAGE} does not import ({error}). Install it: pip install quack-kernels=={VERSION}.*"
    if not version.startswith(f"{VERSION}."):
        return f"quack-kernels {version} is installed, whose interface was not tried; {VERSION} was"
    return None


def fused_mlp(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """down(silu(gate) * up) of x (N, C), gate_up (2 I, C) with the gate's rows before up's, and down (C, I): (N, C).

    Weights of any type: they are cast to x's, and their gradients come in their own.
    Kept for the backward pass are x and the output of the first product; SwiGLU's result is made again beside its
    gradient.
    """
    return _FusedMLP.apply(x, gate_up, down)


class _FusedMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        ctx.weight_dtype = gate_up.dtype
        gate_up, down = gate_up.to(x.dtype), down.to(x.dtype)
        between, out = torch.ops.llammlein.fused_mlp(x, gate_up, down)
        ctx.save_for_backward(x, between, gate_up, down)
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.llammlein.fused_mlp_backward(d_out.contiguous(), *ctx.saved_tensors, ctx.weight_dtype)


@torch.library.custom_op("llammlein::fused_mlp", mutates_args=())
def _fused_mlp(x: Tensor, gate_up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """(N, 2 I), where gate and up alternate as the kernels want them; and the MLP's output (N, C)."""
    quack = importlib.import_module(PACKAGE)
    between, inner = quack.gemm_gated(x, gate_up.T, activation="swiglu", concat_layout=("B",), tuned=False)
    return between, inner @ down.T


@_fused_mlp.register_fake
def _(x: Tensor, gate_up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], gate_up.shape[0]), x.new_empty(x.shape[0], down.shape[0])


@torch.library.custom_op("llammlein::fused_mlp_backward", mutates_args=())
def _fused_mlp_backward(
    d_out: Tensor, x: Tensor, between: Tensor, gate_up: Tensor, down: Tensor, weight_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x in its type, and of both weights in weight_dtype, as the products summed them: in fp32."""
    quack = importlib.import_module(PACKAGE)
    small_tiles = importlib.import_module("quack.gemm_config").GemmConfig(
        tile_m=128, tile_n=128, pingpong=True, cluster_m=1, cluster_n=2, is_dynamic_persistent=False
    )  # the faster for what this product reads and writes beside its sums: docs/benchmarks.md
    d_between, inner = quack.gemm_dgated(d_out, down, between, activation="swiglu", tuned=False, config=small_tiles)
    d_down = _product(d_out.T, inner, weight_dtype)
    del inner
    further = {"tuned": False, "dynamic_scheduler": True}
    d_gate_up = quack.gemm(d_between.T, x, out_dtype=weight_dtype, concat_layout=("out",), **further)
    return quack.gemm(d_between, gate_up, concat_layout=("B",), **further), d_gate_up, d_down


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b, summed in fp32 and rounded once, to dtype."""
    if a.dtype == dtype:
        return a @ b
    return torch.mm(a, b, out_dtype=dtype) if a.is_cuda else a.to(dtype) @ b.to(dtype)


@_fused_mlp_backward.register_fake
def _(
    d_out: Tensor, x: Tensor, between: Tensor, gate_up: Tensor, down: Tensor, weight_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(x),
        torch.empty_like(gate_up, dtype=weight_dtype),
        torch.empty_like(down, dtype=weight_dtype),
    )
