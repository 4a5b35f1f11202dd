"""float8_casts.py's kernels for NVIDIA GPUs, in Triton. They are memory-bound. Each program computes one tile
and masks what lies outside the matrix.

Imported inside functions only, since triton comes with torch's builds for GPUs alone. Every kernel's name begins with
float8_: bench_step.py recognizes them in a profile by that.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

# Casts of four fp32 to 8 bits in PTX: to the nearest, saturating, NaN stays. Triton's own `x.to(tl.float8e4nv)` gave
# wrong bytes where one kernel stores a tile and its transpose: ptxas 12.8 (of torch 2.11.0+cu130, on an H100) read one
# byte in four from a register before writing it. To see it, put that cast, or `.to(tl.float8e5)`, into the two
# functions below and run tests/gpu/test_float8.py::test_cast, whose layout "both" fails.
_E4M3_PTX = tl.constexpr("""{
    .reg .b16 low, high;
    cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
    cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
    mov.b32 $0, {low, high};
}""")
_E5M2_PTX = tl.constexpr(_E4M3_PTX.value.replace("e4m3x2", "e5m2x2"))


@triton.jit
def _to_e4m3(x):
    packed = tl.inline_asm_elementwise(_E4M3_PTX, "=r,f,f,f,f", [x], dtype=tl.int8, is_pure=True, pack=4)
    return packed.to(tl.float8e4nv, bitcast=True)


@triton.jit
def _to_e5m2(x):
    packed = tl.inline_asm_elementwise(_E5M2_PTX, "=r,f,f,f,f", [x], dtype=tl.int8, is_pure=True, pack=4)
    return packed.to(tl.float8e5, bitcast=True)


@triton.jit
def float8_amax(x_ptr, amax_ptr, count, BLOCK: tl.constexpr, ROUNDS: tl.constexpr):
    """Raise amax (fp32, 0 before) to the largest absolute value of x (count,)."""
    start = tl.program_id(0).to(tl.int64) * BLOCK * ROUNDS
    amax = tl.zeros((BLOCK,), tl.float32)
    for turn in range(ROUNDS):
        at = start + turn * BLOCK + tl.arange(0, BLOCK)
        amax = tl.maximum(amax, tl.abs(tl.load(x_ptr + at, mask=at < count, other=0.0).to(tl.float32)))
    tl.atomic_max(amax_ptr, tl.max(amax, 0))


@triton.jit
def float8_cast(
    x_ptr, amax_ptr, out_ptr, transposed_ptr, inverse_scale_ptr, rows, columns, float8_max, amax_floor,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, E4M3: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """x (rows, columns) in 8 bits, itself (ROWS) and its transpose (COLUMNS), scaled by float8_max / amax."""
    row = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    column = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    amax = tl.maximum(tl.load(amax_ptr), amax_floor)
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        tl.store(inverse_scale_ptr, amax / float8_max)
    x = tl.load(x_ptr + row[:, None] * columns + column[None, :], mask=inside, other=0.0).to(tl.float32)
    scaled = x * (float8_max / amax)
    small = _to_e4m3(scaled) if E4M3 else _to_e5m2(scaled)
    if ROWS:
        tl.store(out_ptr + row[:, None] * columns + column[None, :], small, mask=inside)
    if COLUMNS:
        tl.store(transposed_ptr + column[:, None] * rows + row[None, :], tl.trans(small), mask=tl.trans(inside))


@triton.jit
def float8_gated_amax(gate_up_ptr, d_inner_ptr, amax_ptr, rows, width, BACKWARD: tl.constexpr, TILE: tl.constexpr):
    """Raise amax to that of silu(gate) * up, or, BACKWARD, of the gradient of gate_up (rows, 2 width)."""
    row = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    column = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    at = row[:, None] * (2 * width) + column[None, :]
    gate = tl.load(gate_up_ptr + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + at + width, mask=inside, other=0.0).to(tl.float32)
    sigmoid = 1 / (1 + tl.exp(-gate))
    if BACKWARD:
        d_inner = tl.load(d_inner_ptr + row[:, None] * width + column[None, :], mask=inside, other=0.0).to(tl.float32)
        d_gate = d_inner * up * sigmoid * (1 + gate * (1 - sigmoid))
        size = tl.maximum(tl.abs(d_gate), tl.abs(d_inner * gate * sigmoid))
    else:
        size = tl.abs(gate * sigmoid * up)
    tl.atomic_max(amax_ptr, tl.max(tl.max(size, 1), 0))


@triton.jit
def float8_gated_cast(
    gate_up_ptr, amax_ptr, inner_ptr, inverse_scale_ptr, rows, width, float8_max, amax_floor, TILE: tl.constexpr
):
    """silu(gate) * up of gate_up (rows, 2 width) in e4m3, (rows, width)."""
    row = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    column = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    amax = tl.maximum(tl.load(amax_ptr), amax_floor)
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        tl.store(inverse_scale_ptr, amax / float8_max)
    at = row[:, None] * (2 * width) + column[None, :]
    gate = tl.load(gate_up_ptr + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + at + width, mask=inside, other=0.0).to(tl.float32)
    inner = gate / (1 + tl.exp(-gate)) * up * (float8_max / amax)
    tl.store(inner_ptr + row[:, None] * width + column[None, :], _to_e4m3(inner), mask=inside)


@triton.jit
def float8_gated_backward_cast(
    gate_up_ptr, d_inner_ptr, amax_d_ptr, amax_inner_ptr, out_ptr, transposed_ptr, inner_ptr, inverse_scale_ptr,
    rows, width, float8_max_d, float8_max_inner, amax_floor, TILE_M: tl.constexpr, TILE_I: tl.constexpr,
):  # fmt: skip
    """The gradient of gate_up in e5m2, itself and its transpose; silu(gate) * up in e4m3, transposed."""
    row = tl.program_id(0).to(tl.int64) * TILE_M + tl.arange(0, TILE_M)
    column = tl.program_id(1).to(tl.int64) * TILE_I + tl.arange(0, TILE_I)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    transposed_inside = tl.trans(inside)
    amax = tl.maximum(tl.load(amax_d_ptr), amax_floor)
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        tl.store(inverse_scale_ptr, amax / float8_max_d)
    at = row[:, None] * (2 * width) + column[None, :]
    transposed_at = column[:, None] * rows + row[None, :]
    gate = tl.load(gate_up_ptr + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + at + width, mask=inside, other=0.0).to(tl.float32)
    sigmoid = 1 / (1 + tl.exp(-gate))
    silu = gate * sigmoid
    inner = silu * up * (float8_max_inner / tl.maximum(tl.load(amax_inner_ptr), amax_floor))
    tl.store(inner_ptr + transposed_at, tl.trans(_to_e4m3(inner)), mask=transposed_inside)
    d_inner = tl.load(d_inner_ptr + row[:, None] * width + column[None, :], mask=inside, other=0.0).to(tl.float32)
    d_inner *= float8_max_d / amax
    d_gate = _to_e5m2(d_inner * up * sigmoid * (1 + gate * (1 - sigmoid)))
    tl.store(out_ptr + at, d_gate, mask=inside)
    tl.store(transposed_ptr + transposed_at, tl.trans(d_gate), mask=transposed_inside)
    d_up = _to_e5m2(d_inner * silu)
    tl.store(out_ptr + at + width, d_up, mask=inside)
    tl.store(transposed_ptr + (column + width)[:, None] * rows + row[None, :], tl.trans(d_up), mask=transposed_inside)
