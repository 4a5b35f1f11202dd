"""float8.py's operators beside its GEMMs: amax, casts to 8 bits, and SwiGLU between casts.

A tensor has one scale, which takes its largest absolute value (amax) to the largest number of the type. A float8 GEMM
reads both operands along the summed dimension, and training sums each tensor along either dimension in turn, so a cast
writes the tensor, its transpose, or both after reading it once. CPUs take plain torch, GPUs the Triton kernels of
float8_triton.py, which round alike. NaN stays NaN, and an infinity makes the whole tensor NaN.
"""

from __future__ import annotations

import functools
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

# Shapes: M rows, N columns; of the gated operators M tokens, I MLP width.

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
FLOAT8_MAX = {E4M3: 448.0, E5M2: 57344.0}
AMAX_FLOOR = 1e-12
"""An amax below this counts as this, so that a tensor of zeros has a scale."""
_TILE = 128
_BACKWARD_TILE = 32, 64
"""Rows and columns of float8_gated_backward_cast's tile: with three results, a larger one spills registers."""
_AMAX_BLOCK, _AMAX_ROUNDS = 2048, 8
"""Numbers that a program of float8_amax reads at a time, and how many times."""


@torch.library.custom_op("llammlein::float8_amax", mutates_args=())
def float8_amax(x: Tensor) -> Tensor:
    """The amax of contiguous x, a fp32 scalar. On a GPU NaNs do not count; the cast keeps them."""
    if not x.is_cuda:
        return x.abs().max().float()
    amax = torch.zeros((), dtype=torch.float32, device=x.device)
    programs = -(-x.numel() // (_AMAX_BLOCK * _AMAX_ROUNDS))
    _kernels().float8_amax[(programs,)](x, amax, x.numel(), BLOCK=_AMAX_BLOCK, ROUNDS=_AMAX_ROUNDS, num_warps=8)
    return amax


@float8_amax.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty((), dtype=torch.float32)


@torch.library.custom_op("llammlein::float8_cast", mutates_args=())
def float8_cast(x: Tensor, amax: Tensor, dtype: torch.dtype, layout: str) -> tuple[Tensor, Tensor, Tensor]:
    """Contiguous x (M, N) in 8 bits, its transpose (N, M), and their inverse scale, a fp32 scalar.

    layout: "rows" leaves the transpose empty, "columns" the first result, "both" none.
    """
    rows, columns = x.shape
    out = x.new_empty((rows, columns) if layout != "columns" else (0, columns), dtype=dtype)
    transposed = x.new_empty((columns, rows) if layout != "rows" else (0, rows), dtype=dtype)
    inverse_scale = torch.empty((), dtype=torch.float32, device=x.device)
    if not x.is_cuda:
        torch.div(amax.clamp(min=AMAX_FLOOR), FLOAT8_MAX[dtype], out=inverse_scale)
        scaled = _cast(x.float(), amax, dtype)
        return (
            scaled if layout != "columns" else out,
            scaled.T.contiguous() if layout != "rows" else transposed,
            inverse_scale,
        )
    grid = (-(-rows // _TILE), -(-columns // _TILE))
    _kernels().float8_cast[grid](
        x, amax, out, transposed, inverse_scale, rows, columns, FLOAT8_MAX[dtype], AMAX_FLOOR,
        ROWS=layout != "columns", COLUMNS=layout != "rows", E4M3=dtype == E4M3, TILE=_TILE, num_warps=8,
    )  # fmt: skip
    return out, transposed, inverse_scale


@float8_cast.register_fake
def _(x: Tensor, amax: Tensor, dtype: torch.dtype, layout: str) -> tuple[Tensor, Tensor, Tensor]:
    rows, columns = x.shape
    out = x.new_empty((rows, columns) if layout != "columns" else (0, columns), dtype=dtype)
    transposed = x.new_empty((columns, rows) if layout != "rows" else (0, rows), dtype=dtype)
    return out, transposed, x.new_empty((), dtype=torch.float32)


@torch.library.custom_op("llammlein::gated_amax", mutates_args=())
def gated_amax(gate_up: Tensor, d_inner: Tensor | None) -> Tensor:
    """The amax of silu(gate) * up, from gate_up (M, 2 I); given d_inner (M, I), that of gate_up's gradient. fp32."""
    if not gate_up.is_cuda:
        values = _inner(gate_up) if d_inner is None else _d_gate_up(gate_up, d_inner)
        return values.abs().max()
    amax = torch.zeros((), dtype=torch.float32, device=gate_up.device)
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    grid = (-(-rows // _TILE), -(-width // _TILE))
    _kernels().float8_gated_amax[grid](
        gate_up, gate_up if d_inner is None else d_inner, amax, rows, width,
        BACKWARD=d_inner is not None, TILE=_TILE, num_warps=8,
    )  # fmt: skip
    return amax


@gated_amax.register_fake
def _(gate_up: Tensor, d_inner: Tensor | None) -> Tensor:
    return gate_up.new_empty((), dtype=torch.float32)


@torch.library.custom_op("llammlein::gated_cast", mutates_args=())
def gated_cast(gate_up: Tensor, amax: Tensor) -> tuple[Tensor, Tensor]:
    """silu(gate) * up of gate_up (M, 2 I) in e4m3, (M, I), and its inverse scale."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    inverse_scale = torch.empty((), dtype=torch.float32, device=gate_up.device)
    if not gate_up.is_cuda:
        torch.div(amax.clamp(min=AMAX_FLOOR), FLOAT8_MAX[E4M3], out=inverse_scale)
        return _cast(_inner(gate_up), amax, E4M3), inverse_scale
    inner = gate_up.new_empty((rows, width), dtype=E4M3)
    grid = (-(-rows // _TILE), -(-width // _TILE))
    _kernels().float8_gated_cast[grid](
        gate_up, amax, inner, inverse_scale, rows, width, FLOAT8_MAX[E4M3], AMAX_FLOOR, TILE=_TILE, num_warps=8
    )
    return inner, inverse_scale


@gated_cast.register_fake
def _(gate_up: Tensor, amax: Tensor) -> tuple[Tensor, Tensor]:
    inner = gate_up.new_empty((gate_up.shape[0], gate_up.shape[1] // 2), dtype=E4M3)
    return inner, gate_up.new_empty((), dtype=torch.float32)


@torch.library.custom_op("llammlein::gated_backward_cast", mutates_args=())
def gated_backward_cast(
    gate_up: Tensor, d_inner: Tensor, amax_d: Tensor, amax_inner: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """From gate_up (M, 2 I) and d_inner (M, I): gate_up's gradient in e5m2, (M, 2 I) and transposed (2 I, M), its
    inverse scale, and silu(gate) * up in e4m3, transposed (I, M)."""
    rows, width = d_inner.shape
    inverse_scale = torch.empty((), dtype=torch.float32, device=gate_up.device)
    if not gate_up.is_cuda:
        torch.div(amax_d.clamp(min=AMAX_FLOOR), FLOAT8_MAX[E5M2], out=inverse_scale)
        d_gate_up = _cast(_d_gate_up(gate_up, d_inner), amax_d, E5M2)
        inner = _cast(_inner(gate_up), amax_inner, E4M3).T.contiguous()
        return d_gate_up, d_gate_up.T.contiguous(), inverse_scale, inner
    out = gate_up.new_empty((rows, 2 * width), dtype=E5M2)
    transposed = gate_up.new_empty((2 * width, rows), dtype=E5M2)
    inner = gate_up.new_empty((width, rows), dtype=E4M3)
    grid = (-(-rows // _BACKWARD_TILE[0]), -(-width // _BACKWARD_TILE[1]))
    _kernels().float8_gated_backward_cast[grid](
        gate_up, d_inner, amax_d, amax_inner, out, transposed, inner, inverse_scale, rows, width,
        FLOAT8_MAX[E5M2], FLOAT8_MAX[E4M3], AMAX_FLOOR, TILE_M=_BACKWARD_TILE[0], TILE_I=_BACKWARD_TILE[1], num_warps=4,
    )  # fmt: skip
    return out, transposed, inverse_scale, inner


@gated_backward_cast.register_fake
def _(gate_up: Tensor, d_inner: Tensor, amax_d: Tensor, amax_inner: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, width = d_inner.shape
    return (
        gate_up.new_empty((rows, 2 * width), dtype=E5M2),
        gate_up.new_empty((2 * width, rows), dtype=E5M2),
        gate_up.new_empty((), dtype=torch.float32),
        gate_up.new_empty((width, rows), dtype=E4M3),
    )


def _cast(x: Tensor, amax: Tensor, dtype: torch.dtype) -> Tensor:
    scaled = x * (FLOAT8_MAX[dtype] / amax.clamp(min=AMAX_FLOOR))
    return scaled.clamp(-FLOAT8_MAX[dtype], FLOAT8_MAX[dtype]).to(dtype)


def _inner(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.float().chunk(2, dim=-1)
    return F.silu(gate) * up


def _d_gate_up(gate_up: Tensor, d_inner: Tensor) -> Tensor:
    gate, up = gate_up.float().chunk(2, dim=-1)
    sigmoid, d_inner = gate.sigmoid(), d_inner.float()
    return torch.cat((d_inner * up * sigmoid * (1 + gate * (1 - sigmoid)), d_inner * gate * sigmoid), dim=-1)


@functools.cache
def _kernels() -> ModuleType:
    from lit_gpt.model import float8_triton

    return float8_triton
