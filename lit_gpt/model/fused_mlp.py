"""GEMMs with an epilogue: SwiGLU (arXiv:2002.05202), its gradient, the addition of the residual.

Layer by layer, the tensors between GEMMs cross the GPU's memory several times: in the MLP down(silu(gate) * up), whose
gate and up are halves of one weight, these are 2 I and I numbers a token, and their gradients. Two backends:

    quack   computes them in the GEMMs' epilogues, while the results are in registers. Needs quack-kernels, which
            flash-attn-4 brings, a Hopper GPU, and computation in 16 bits
    torch   layer by layer; torch.compile fuses what stands between the GEMMs. Runs everywhere

The only importer of quack.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_gpt.cli import BadInput
from lit_gpt.model.kernel_trial import why_kernels_fail

log = logging.getLogger(__name__)

# Shapes: N tokens, C width, I MLP width; of a weight's gradient (M, K).

BACKENDS = ("quack", "torch")
PACKAGE = "quack.gemm_interface"
VERSION = "0.6"
"""The minor version of quack-kernels: the next one may have another interface."""
MULTIPLE = 16
"""Widths that quack's kernels read must be multiples of this."""
DYNAMIC = {"tuned": False, "dynamic_scheduler": True}
"""Default tiles, no autotuning; an SM that is done takes the next tile. Measured: docs/benchmark_log.md."""


class Tiles(NamedTuple):
    """The part of a GEMM's result that an SM computes at a time, tile_m x tile_n; a cluster of SMs shares operands."""

    tile_m: int
    tile_n: int
    pingpong: bool
    cluster_m: int
    cluster_n: int


SMALL = Tiles(128, 128, True, 1, 2)
"""For the GEMM with SwiGLU's gradient as its epilogue: the fastest of those measured."""
GRADIENT_TILES = (Tiles(128, 192, True, 2, 1), Tiles(256, 176, False, 1, 2))
"""For the gradient of a weight. It has few tiles, so its time depends on how many SMs idle in the last wave."""
WORTHWHILE = 0.9
"""cuBLAS, which can split the sum (split-K), computes a weight's gradient if our tiles keep SMs busy less than this."""


def choose_mlp(requested: str, device: torch.device, dtype: torch.dtype, widths: tuple[int, int]) -> str:
    """The backend that `requested` ("auto" or a name) stands for at widths C and I; raises BadInput if it cannot run.

    quack's kernels are tried at these widths before they are chosen.
    """
    if requested not in ("auto", *BACKENDS):
        raise BadInput(f"unknown mlp {requested!r}. Valid: auto, {', '.join(BACKENDS)}")
    reason = _why_not_quack(device, dtype, widths)
    if requested == "quack" and reason is not None:
        raise BadInput(f"--mlp quack cannot run here: {reason}. Valid here: torch")
    chosen = "torch" if requested == "torch" or reason is not None else "quack"
    log.info("mlp: %s (asked for: %s)%s", chosen, requested, f"; not quack: {reason}" if reason else "")
    return chosen


def _why_not_quack(device: torch.device, dtype: torch.dtype, widths: tuple[int, int]) -> str | None:
    if device.type != "cuda":
        return f"it needs a Hopper GPU, this run is on {device.type}"
    major, minor = torch.cuda.get_device_capability(device)
    if major != 9:
        return f"it was not measured on compute capability {major}.{minor}"
    if reason := why_not_shape(dtype, widths):
        return reason
    try:
        importlib.import_module(PACKAGE)
        version = importlib.metadata.version("quack-kernels")
    except ImportError as error:
        return f"{PACKAGE} does not import ({error}). Install it: pip install quack-kernels=={VERSION}.*"
    if not version.startswith(f"{VERSION}."):
        return f"quack-kernels {version} is installed, whose interface was not tried; {VERSION} was"
    return _trial(device, dtype, widths)


def _trial(device: torch.device, dtype: torch.dtype, widths: tuple[int, int]) -> str | None:
    """Why quack's kernels fail at these widths, compared with the plain formula; None if they are right."""
    log.info("mlp: trying the kernels of quack, which are compiled at their first use")
    tokens, (width, inner) = 256, widths
    shapes = [(tokens, width), (tokens, width), (2 * inner, width), (width, inner)]
    return why_kernels_fail(fused_mlp, _plain_mlp, shapes, torch.empty(0, device=device, dtype=dtype))


def _plain_mlp(x: Tensor, residual: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = F.linear(x, gate_up).chunk(2, dim=-1)
    return residual + F.linear(F.silu(gate) * up, down)


def why_not_shape(dtype: torch.dtype, widths: tuple[int, ...]) -> str | None:
    """Why quack cannot compute in this type at these widths, in words for a user; None if it can."""
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it computes in 16 bits, this run in {dtype}"
    if any(width % MULTIPLE for width in widths):
        return f"the widths {widths} are no multiples of {MULTIPLE}"
    return None


def fused_mlp(x: Tensor, residual: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """residual + down(silu(gate) * up) of x (N, C): (N, C).

    residual (N, C); gate_up (2 I, C), the gate's rows before up's; down (C, I). Both weights are cast to x's type, and
    their gradients have their own type. The backward pass keeps x and the output of the first GEMM; it recomputes
    SwiGLU's result together with its gradient.
    """
    return _FusedMLP.apply(x, residual, gate_up, down)


def add_matmul(residual: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """residual + x @ weight.T of x (N, K), residual (N, C) and weight (C, K), cast to x's type: (N, C)."""
    return _AddMatmul.apply(residual, x, weight)


class _FusedMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        ctx.weight_dtype = gate_up.dtype
        gate_up, down = gate_up.to(x.dtype), down.to(x.dtype)
        between, out = torch.ops.llammlein.fused_mlp(x, residual, gate_up, down)
        ctx.save_for_backward(x, between, gate_up, down)
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        d_out = d_out.contiguous()
        d_x, d_gate_up, d_down = torch.ops.llammlein.fused_mlp_backward(d_out, *ctx.saved_tensors, ctx.weight_dtype)
        return d_x, d_out, d_gate_up, d_down


class _AddMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, residual: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        ctx.weight_dtype = weight.dtype
        weight = weight.to(x.dtype)
        ctx.save_for_backward(x, weight)
        return torch.ops.llammlein.add_matmul(residual, x, weight)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        d_out = d_out.contiguous()
        d_x, d_weight = torch.ops.llammlein.add_matmul_backward(d_out, *ctx.saved_tensors, ctx.weight_dtype)
        return d_out, d_x, d_weight


@torch.library.custom_op("llammlein::fused_mlp", mutates_args=())
def _fused_mlp(x: Tensor, residual: Tensor, gate_up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """gate and up (N, 2 I), their columns interleaved as the kernels want them, and the result (N, C)."""
    quack = importlib.import_module(PACKAGE)
    between, inner = quack.gemm_gated(x, gate_up.T, activation="swiglu", concat_layout=("B",), tuned=False)
    return between, quack.gemm_add(inner, down.T, residual, **DYNAMIC)


@_fused_mlp.register_fake
def _(x: Tensor, residual: Tensor, gate_up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], gate_up.shape[0]), x.new_empty(x.shape[0], down.shape[0])


@torch.library.custom_op("llammlein::fused_mlp_backward", mutates_args=())
def _fused_mlp_backward(
    d_out: Tensor, x: Tensor, between: Tensor, gate_up: Tensor, down: Tensor, weight_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x in its type, and of both weights in weight_dtype; all are summed in fp32."""
    quack = importlib.import_module(PACKAGE)
    d_between, inner = quack.gemm_dgated(d_out, down, between, activation="swiglu", tuned=False, config=_config(SMALL))
    d_down = _weight_gradient(d_out, inner, weight_dtype)
    del inner
    d_gate_up = _weight_gradient(d_between, x, weight_dtype, interleaved=True)
    return quack.gemm(d_between, gate_up, concat_layout=("B",), **DYNAMIC), d_gate_up, d_down


@_fused_mlp_backward.register_fake
def _(
    d_out: Tensor, x: Tensor, between: Tensor, gate_up: Tensor, down: Tensor, weight_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(x),
        torch.empty_like(gate_up, dtype=weight_dtype),
        torch.empty_like(down, dtype=weight_dtype),
    )


@torch.library.custom_op("llammlein::add_matmul", mutates_args=())
def _add_matmul(residual: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    return importlib.import_module(PACKAGE).gemm_add(x, weight.T, residual, **DYNAMIC)


@_add_matmul.register_fake
def _(residual: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@torch.library.custom_op("llammlein::add_matmul_backward", mutates_args=())
def _add_matmul_backward(d_out: Tensor, x: Tensor, weight: Tensor, weight_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    d_x = importlib.import_module(PACKAGE).gemm(d_out, weight, **DYNAMIC)
    return d_x, _weight_gradient(d_out, x, weight_dtype)


@_add_matmul_backward.register_fake
def _(d_out: Tensor, x: Tensor, weight: Tensor, weight_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight, dtype=weight_dtype)


def _weight_gradient(d_out: Tensor, x: Tensor, dtype: torch.dtype, *, interleaved: bool = False) -> Tensor:
    """d_out.T @ x, (M, K) of d_out (N, M) and x (N, K), summed in fp32 and rounded once, to dtype.

    interleaved: the columns of d_out alternate between gate and up; the gradient's halves lie one after the other.
    """
    shape = d_out.shape[1], x.shape[1]
    tiles, busy = best_tiles(*shape, _sm_count(d_out.device))
    if busy < WORTHWHILE and not interleaved:
        return _cublas_matmul(d_out.T, x, dtype)
    out = x.new_empty(shape, dtype=dtype)
    gemm = importlib.import_module(PACKAGE).gemm_tuned.fn  # what quack.gemm calls, which takes no tiles
    layout = ("out",) if interleaved else None
    gemm(d_out.T, x, out, config=_config(tiles), dynamic_scheduler=True, concat_layout=layout)
    return out


def best_tiles(rows: int, columns: int, sms: int) -> tuple[Tiles, float]:
    """Which of GRADIENT_TILES computes rows x columns soonest, and the share of the SMs' time that it uses."""

    def time(tiles: Tiles) -> int:
        count = -(-rows // tiles.tile_m) * -(-columns // tiles.tile_n)
        return -(-count // sms) * tiles.tile_m * tiles.tile_n

    best = min(GRADIENT_TILES, key=time)
    return best, rows * columns / (sms * time(best))


@cache
def _sm_count(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _config(tiles: Tiles) -> Any:
    gemm_config = importlib.import_module("quack.gemm_config")
    return gemm_config.GemmConfig(**tiles._asdict(), is_dynamic_persistent=False)


def _cublas_matmul(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b, summed in fp32 and rounded once, to dtype."""
    if a.dtype == dtype:
        return a @ b
    return torch.mm(a, b, out_dtype=dtype) if a.is_cuda else a.to(dtype) @ b.to(dtype)
