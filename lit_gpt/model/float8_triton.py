"""What float8.py computes beside its products: largest absolute values, casts to 8 bits, and SwiGLU between casts.

A tensor is scaled by one number, so that its largest absolute value becomes the largest that the type holds. A product
of 8-bit matrices reads both operands along the summed dimension, and a tensor is summed along either in turn: casts
write a tensor, its transpose, or both from one reading. On a GPU these are Triton kernels, bound by memory; elsewhere
plain torch, with the same roundings. NaN stays NaN, and a tensor that holds an infinity becomes NaN.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Shapes: M rows, N columns; of the gated operators M tokens, I MLP width.

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
LARGEST = {E4M3: 448.0, E5M2: 57344.0}
SMALLEST_MAX = 1e-12
"""Largest absolute values below it count as it, so that a tensor of zeros has a scale."""
_TILE = 128
_TILE_OF_THREE = 32, 64
"""Rows and columns of a tile of which a kernel makes three results: larger ones leave too few registers."""
_STRETCH, _ROUNDS = 2048, 8
"""Numbers that a program of the search for the largest reads at a time, and how often."""


@torch.library.custom_op("llammlein::absolute_max", mutates_args=())
def absolute_max(x: Tensor) -> Tensor:
    """Largest absolute value of contiguous x, a fp32 scalar; NaNs are passed over on a GPU (the cast keeps them)."""
    if not x.is_cuda:
        return x.abs().max().float()
    largest = torch.zeros((), dtype=torch.float32, device=x.device)
    programs = -(-x.numel() // (_STRETCH * _ROUNDS))
    _kernels().absolute_max[(programs,)](x, largest, x.numel(), BLOCK=_STRETCH, ROUNDS=_ROUNDS, num_warps=8)
    return largest


@absolute_max.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty((), dtype=torch.float32)


@torch.library.custom_op("llammlein::float8_cast", mutates_args=())
def float8_cast(x: Tensor, largest: Tensor, dtype: torch.dtype, layout: str) -> tuple[Tensor, Tensor, Tensor]:
    """Contiguous x (M, N) in 8 bits, the same transposed (N, M), and the fp32 scalar that undoes their scale.

    layout "rows" leaves the second empty, "columns" the first, "both" none.
    """
    rows, columns = x.shape
    straight = x.new_empty((rows, columns) if layout != "columns" else (0, columns), dtype=dtype)
    turned = x.new_empty((columns, rows) if layout != "rows" else (0, rows), dtype=dtype)
    unscale = torch.empty((), dtype=torch.float32, device=x.device)
    if not x.is_cuda:
        torch.div(largest.clamp(min=SMALLEST_MAX), LARGEST[dtype], out=unscale)
        scaled = _round(x.float(), largest, dtype)
        return (
            scaled if layout != "columns" else straight,
            scaled.T.contiguous() if layout != "rows" else turned,
            unscale,
        )
    grid = (-(-rows // _TILE), -(-columns // _TILE))
    _kernels().cast[grid](
        x, largest, straight, turned, unscale, rows, columns, LARGEST[dtype], SMALLEST_MAX,
        ROWS=layout != "columns", COLUMNS=layout != "rows", E4M3=dtype == E4M3, TILE=_TILE, num_warps=8,
    )  # fmt: skip
    return straight, turned, unscale


@float8_cast.register_fake
def _(x: Tensor, largest: Tensor, dtype: torch.dtype, layout: str) -> tuple[Tensor, Tensor, Tensor]:
    rows, columns = x.shape
    straight = x.new_empty((rows, columns) if layout != "columns" else (0, columns), dtype=dtype)
    turned = x.new_empty((columns, rows) if layout != "rows" else (0, rows), dtype=dtype)
    return straight, turned, x.new_empty((), dtype=torch.float32)


@torch.library.custom_op("llammlein::gated_absolute_max", mutates_args=())
def gated_absolute_max(gate_up: Tensor, d_inner: Tensor | None) -> Tensor:
    """Largest absolute value of silu(gate) * up, of gate_up (M, 2 I); given d_inner (M, I), of gate_up's gradient."""
    if not gate_up.is_cuda:
        values = _inner(gate_up) if d_inner is None else _d_gate_up(gate_up, d_inner)
        return values.abs().max()
    largest = torch.zeros((), dtype=torch.float32, device=gate_up.device)
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    grid = (-(-rows // _TILE), -(-width // _TILE))
    _gated_kernels().absolute_max[grid](
        gate_up, gate_up if d_inner is None else d_inner, largest, rows, width,
        BACKWARD=d_inner is not None, TILE=_TILE, num_warps=8,
    )  # fmt: skip
    return largest


@gated_absolute_max.register_fake
def _(gate_up: Tensor, d_inner: Tensor | None) -> Tensor:
    return gate_up.new_empty((), dtype=torch.float32)


@torch.library.custom_op("llammlein::gated_cast", mutates_args=())
def gated_cast(gate_up: Tensor, largest: Tensor) -> tuple[Tensor, Tensor]:
    """silu(gate) * up of gate_up (M, 2 I) in e4m3 (M, I), and what undoes its scale."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    unscale = torch.empty((), dtype=torch.float32, device=gate_up.device)
    if not gate_up.is_cuda:
        torch.div(largest.clamp(min=SMALLEST_MAX), LARGEST[E4M3], out=unscale)
        return _round(_inner(gate_up), largest, E4M3), unscale
    inner = gate_up.new_empty((rows, width), dtype=E4M3)
    grid = (-(-rows // _TILE), -(-width // _TILE))
    _gated_kernels().cast[grid](
        gate_up, largest, inner, unscale, rows, width, LARGEST[E4M3], SMALLEST_MAX, TILE=_TILE, num_warps=8
    )
    return inner, unscale


@gated_cast.register_fake
def _(gate_up: Tensor, largest: Tensor) -> tuple[Tensor, Tensor]:
    inner = gate_up.new_empty((gate_up.shape[0], gate_up.shape[1] // 2), dtype=E4M3)
    return inner, gate_up.new_empty((), dtype=torch.float32)


@torch.library.custom_op("llammlein::gated_backward_cast", mutates_args=())
def gated_backward_cast(
    gate_up: Tensor, d_inner: Tensor, largest_d: Tensor, largest_inner: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """From gate_up (M, 2 I) and d_inner (M, I): gate_up's gradient in e5m2, (M, 2 I) and (2 I, M), what undoes its
    scale, and silu(gate) * up in e4m3 transposed, (I, M)."""
    rows, width = d_inner.shape
    unscale = torch.empty((), dtype=torch.float32, device=gate_up.device)
    if not gate_up.is_cuda:
        torch.div(largest_d.clamp(min=SMALLEST_MAX), LARGEST[E5M2], out=unscale)
        d_gate_up = _round(_d_gate_up(gate_up, d_inner), largest_d, E5M2)
        return d_gate_up, d_gate_up.T.contiguous(), unscale, _round(_inner(gate_up), largest_inner, E4M3).T.contiguous()
    straight = gate_up.new_empty((rows, 2 * width), dtype=E5M2)
    turned = gate_up.new_empty((2 * width, rows), dtype=E5M2)
    inner = gate_up.new_empty((width, rows), dtype=E4M3)
    grid = (-(-rows // _TILE_OF_THREE[0]), -(-width // _TILE_OF_THREE[1]))
    _gated_kernels().backward_cast[grid](
        gate_up, d_inner, largest_d, largest_inner, straight, turned, inner, unscale, rows, width,
        LARGEST[E5M2], LARGEST[E4M3], SMALLEST_MAX, TILE_M=_TILE_OF_THREE[0], TILE_I=_TILE_OF_THREE[1], num_warps=4,
    )  # fmt: skip
    return straight, turned, unscale, inner


@gated_backward_cast.register_fake
def _(
    gate_up: Tensor, d_inner: Tensor, largest_d: Tensor, largest_inner: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, width = d_inner.shape
    return (
        gate_up.new_empty((rows, 2 * width), dtype=E5M2),
        gate_up.new_empty((2 * width, rows), dtype=E5M2),
        gate_up.new_empty((), dtype=torch.float32),
        gate_up.new_empty((width, rows), dtype=E4M3),
    )


def _round(x: Tensor, largest: Tensor, dtype: torch.dtype) -> Tensor:
    scaled = x * (LARGEST[dtype] / largest.clamp(min=SMALLEST_MAX))
    return scaled.clamp(-LARGEST[dtype], LARGEST[dtype]).to(dtype)


def _inner(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.float().chunk(2, dim=-1)
    return F.silu(gate) * up


def _d_gate_up(gate_up: Tensor, d_inner: Tensor) -> Tensor:
    gate, up = gate_up.float().chunk(2, dim=-1)
    sigmoid, d_inner = gate.sigmoid(), d_inner.float()
    return torch.cat((d_inner * up * sigmoid * (1 + gate * (1 - sigmoid)), d_inner * gate * sigmoid), dim=-1)


_FOUR_AT_ONCE = """{
    .reg .b16 low, high;
    cvt.rn.satfinite.%s.f32 low, $2, $1;
    cvt.rn.satfinite.%s.f32 high, $4, $3;
    mov.b32 $0, {low, high};
}"""
"""Four numbers to 8 bits, in PTX. Triton's own cast makes two halves; where their bytes are also used one by one, as by
a tile that is stored straight and turned, ptxas 12.8 reads a byte in four from a register before it is written."""


@functools.cache
def _casts() -> tuple[Any, Any]:
    """fp32 to e4m3 and to e5m2: rounded to nearest, too large becomes the largest, NaN stays."""
    import triton
    import triton.language as tl

    e4m3 = tl.constexpr(_FOUR_AT_ONCE.replace("%s", "e4m3x2"))
    e5m2 = tl.constexpr(_FOUR_AT_ONCE.replace("%s", "e5m2x2"))

    @triton.jit
    def to_e4m3(x):  # type: ignore[no-untyped-def]
        packed = tl.inline_asm_elementwise(e4m3, "=r,f,f,f,f", [x], dtype=tl.int8, is_pure=True, pack=4)
        return packed.to(tl.float8e4nv, bitcast=True)

    @triton.jit
    def to_e5m2(x):  # type: ignore[no-untyped-def]
        packed = tl.inline_asm_elementwise(e5m2, "=r,f,f,f,f", [x], dtype=tl.int8, is_pure=True, pack=4)
        return packed.to(tl.float8e5, bitcast=True)

    return to_e4m3, to_e5m2


@functools.cache
def _kernels() -> Any:
    """Made when first called: triton comes with torch's builds for GPUs only."""
    import triton
    import triton.language as tl

    to_e4m3, to_e5m2 = _casts()

    @triton.jit
    def absolute_max(x_ptr, largest_ptr, count, BLOCK: tl.constexpr, ROUNDS: tl.constexpr):  # type: ignore[no-untyped-def]
        start = tl.program_id(0).to(tl.int64) * BLOCK * ROUNDS
        largest = tl.zeros((BLOCK,), tl.float32)
        for turn in range(ROUNDS):
            at = start + turn * BLOCK + tl.arange(0, BLOCK)
            largest = tl.maximum(largest, tl.abs(tl.load(x_ptr + at, mask=at < count, other=0.0).to(tl.float32)))
        tl.atomic_max(largest_ptr, tl.max(largest, 0))

    @triton.jit
    def cast(  # type: ignore[no-untyped-def]
        x_ptr, largest_ptr, straight_ptr, turned_ptr, unscale_ptr, rows, columns, limit, smallest,
        ROWS: tl.constexpr, COLUMNS: tl.constexpr, E4M3: tl.constexpr, TILE: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
        column = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        largest = tl.maximum(tl.load(largest_ptr), smallest)
        if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
            tl.store(unscale_ptr, largest / limit)
        x = tl.load(x_ptr + row[:, None] * columns + column[None, :], mask=inside, other=0.0).to(tl.float32)
        scaled = x * (limit / largest)
        small = to_e4m3(scaled) if E4M3 else to_e5m2(scaled)
        if ROWS:
            tl.store(straight_ptr + row[:, None] * columns + column[None, :], small, mask=inside)
        if COLUMNS:
            tl.store(turned_ptr + column[:, None] * rows + row[None, :], tl.trans(small), mask=tl.trans(inside))

    return SimpleNamespace(absolute_max=absolute_max, cast=cast)


@functools.cache
def _gated_kernels() -> Any:
    import triton
    import triton.language as tl

    to_e4m3, to_e5m2 = _casts()

    @triton.jit
    def gated_absolute_max(  # type: ignore[no-untyped-def]
        gate_up_ptr, d_inner_ptr, largest_ptr, rows, width, BACKWARD: tl.constexpr, TILE: tl.constexpr
    ):
        row = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
        column = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)
        inside = (row < rows)[:, None] & (column < width)[None, :]
        at = row[:, None] * (2 * width) + column[None, :]
        gate = tl.load(gate_up_ptr + at, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(gate_up_ptr + at + width, mask=inside, other=0.0).to(tl.float32)
        sigmoid = 1 / (1 + tl.exp(-gate))
        if BACKWARD:
            d_inner = tl.load(d_inner_ptr + row[:, None] * width + column[None, :], mask=inside, other=0.0).to(
                tl.float32
            )
            d_gate = d_inner * up * sigmoid * (1 + gate * (1 - sigmoid))
            size = tl.maximum(tl.abs(d_gate), tl.abs(d_inner * gate * sigmoid))
        else:
            size = tl.abs(gate * sigmoid * up)
        tl.atomic_max(largest_ptr, tl.max(tl.max(size, 1), 0))

    @triton.jit
    def gated_cast(  # type: ignore[no-untyped-def]
        gate_up_ptr, largest_ptr, inner_ptr, unscale_ptr, rows, width, limit, smallest, TILE: tl.constexpr
    ):
        row = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
        column = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)
        inside = (row < rows)[:, None] & (column < width)[None, :]
        largest = tl.maximum(tl.load(largest_ptr), smallest)
        if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
            tl.store(unscale_ptr, largest / limit)
        at = row[:, None] * (2 * width) + column[None, :]
        gate = tl.load(gate_up_ptr + at, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(gate_up_ptr + at + width, mask=inside, other=0.0).to(tl.float32)
        inner = gate / (1 + tl.exp(-gate)) * up * (limit / largest)
        tl.store(inner_ptr + row[:, None] * width + column[None, :], to_e4m3(inner), mask=inside)

    @triton.jit
    def gated_backward_cast(  # type: ignore[no-untyped-def]
        gate_up_ptr, d_inner_ptr, largest_d_ptr, largest_inner_ptr, straight_ptr, turned_ptr, inner_ptr, unscale_ptr,
        rows, width, limit_d, limit_inner, smallest, TILE_M: tl.constexpr, TILE_I: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64) * TILE_M + tl.arange(0, TILE_M)
        column = tl.program_id(1).to(tl.int64) * TILE_I + tl.arange(0, TILE_I)
        inside = (row < rows)[:, None] & (column < width)[None, :]
        turned_inside = tl.trans(inside)
        largest = tl.maximum(tl.load(largest_d_ptr), smallest)
        if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
            tl.store(unscale_ptr, largest / limit_d)
        at = row[:, None] * (2 * width) + column[None, :]
        turned_at = column[:, None] * rows + row[None, :]
        gate = tl.load(gate_up_ptr + at, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(gate_up_ptr + at + width, mask=inside, other=0.0).to(tl.float32)
        sigmoid = 1 / (1 + tl.exp(-gate))
        silu = gate * sigmoid
        inner = silu * up * (limit_inner / tl.maximum(tl.load(largest_inner_ptr), smallest))
        tl.store(inner_ptr + turned_at, tl.trans(to_e4m3(inner)), mask=turned_inside)
        d_inner = tl.load(d_inner_ptr + row[:, None] * width + column[None, :], mask=inside, other=0.0).to(tl.float32)
        d_inner *= limit_d / largest
        d_gate = to_e5m2(d_inner * up * sigmoid * (1 + gate * (1 - sigmoid)))
        tl.store(straight_ptr + at, d_gate, mask=inside)
        tl.store(turned_ptr + turned_at, tl.trans(d_gate), mask=turned_inside)
        d_up = to_e5m2(d_inner * silu)
        tl.store(straight_ptr + at + width, d_up, mask=inside)
        tl.store(turned_ptr + (column + width)[:, None] * rows + row[None, :], tl.trans(d_up), mask=turned_inside)

    return SimpleNamespace(absolute_max=gated_absolute_max, cast=gated_cast, backward_cast=gated_backward_cast)
