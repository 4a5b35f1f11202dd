"""Float8: the blocks' GEMMs in 8 bits. Embedding, head, norms and attention keep the type that the model computes in.

Weights, gradients and the optimizer keep the types that `precision` gives them. Before each GEMM its operands are
scaled and cast: activations and weights to e4m3 (3 bits of mantissa), gradients of activations to e5m2 (2 bits, a wider
range). Two recipes:

    tensorwise  ours: one scale a tensor, from its amax at that moment, so that nothing is remembered between steps. A
                tensor is read once for its amax, or the compiled code that makes it finds the amax, and once for both
                layouts that its GEMMs need. Between gate, up and down only the first GEMM's output is written in more
                than 8 bits. Agrees with torchao's tensorwise recipe, whose casts cost two thirds of what its GEMMs gain
                (docs/benchmark_log.md)
    rowwise     torchao's: one scale a row, so that small values beside large ones keep more digits
"""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lit_gpt.cli import BadInput
from lit_gpt.model.float8_casts import (
    E4M3,
    E5M2,
    float8_amax,
    float8_cast,
    gated_amax,
    gated_backward_cast,
    gated_cast,
)
from lit_gpt.model.gpt import Block, Linear

# Shapes: N tokens, C width, I MLP width; of a GEMM (M, K) with (N, K).
# Names: x8 is x in 8 bits, x8_t its transpose, x_inv their inverse scale.

MULTIPLE = 16
"""Both sides of a float8 GEMM's operands must be multiples of this."""


def use_float8(blocks: nn.ModuleList, recipe: str, device: torch.device) -> None:
    """Make the GEMMs of `blocks` float8; weights keep their names and values.

    Raises BadInput if the device has no 8-bit GEMMs, torchao is missing, or a width is no multiple of MULTIPLE.
    """
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise BadInput(f"--float8 {recipe}: {torch.cuda.get_device_name(device)} has no float8. Valid here: none")
    for name, linear in blocks.named_modules():
        if isinstance(linear, nn.Linear) and (linear.in_features % MULTIPLE or linear.out_features % MULTIPLE):
            raise BadInput(
                f"--float8 {recipe}: {name} is {linear.out_features} x {linear.in_features}, no multiples of {MULTIPLE}"
            )
    if recipe == "rowwise":
        _use_torchao(blocks, device)
        return
    for block in blocks:
        assert isinstance(block, Block)
        block.attn.qkv = Float8Linear(block.attn.qkv, compiled_input=True)
        block.attn.proj = Float8Linear(block.attn.proj, compiled_gradient=True)
        block.mlp.fused = float8_mlp


def _use_torchao(blocks: nn.ModuleList, device: torch.device) -> None:
    try:
        torchao = importlib.import_module("torchao.float8")
    except ImportError as error:
        raise BadInput(
            f"--float8 rowwise: torchao does not import ({error}). Install it: pip install -e '.[float8]'"
        ) from None
    config = torchao.Float8LinearConfig.from_recipe_name("rowwise")
    if device.type == "cpu":
        config = replace(config, emulate=True)  # 8-bit numbers multiplied in full precision
    torchao.convert_to_float8_training(blocks, config=config)


class Float8Linear(Linear):
    """A linear layer with the weight of another, whose three GEMMs are float8, tensorwise.

    compiled_input, compiled_gradient: whether compiled code makes that tensor, and so finds its amax on the way.
    """

    def __init__(self, linear: Linear, *, compiled_input: bool = False, compiled_gradient: bool = False) -> None:
        super(nn.Linear, self).__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = linear.weight
        self.register_parameter("bias", None)
        self.compiled_input, self.compiled_gradient = compiled_input, compiled_gradient

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, -2)
        return _Linear.apply(flat, self.weight, self.compiled_input, self.compiled_gradient).unflatten(0, x.shape[:-1])


def float8_mlp(x: Tensor, residual: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """fused_mlp.fused_mlp with float8 GEMMs: x and residual (N, C), gate_up (2 I, C), down (C, I): (N, C)."""
    return residual + _MLP.apply(x, gate_up, down)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, compiled_input: bool, compiled_gradient: bool) -> Tensor:
        x8, x8_t, x_inv = float8_cast(x, _amax(x, compiled_input), E4M3, "both")
        amax = float8_amax(weight)
        w8, _, w_inv = float8_cast(weight, amax, E4M3, "rows")
        ctx.save_for_backward(x8_t, x_inv, weight, amax)
        ctx.compiled_gradient = compiled_gradient
        return _gemm(x8, x_inv, w8, w_inv, x.dtype)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x8_t, x_inv, weight, amax = ctx.saved_tensors
        d_out = d_out.contiguous()
        d8, d8_t, d_inv = float8_cast(d_out, _amax(d_out, ctx.compiled_gradient), E5M2, "both")
        _, w8_t, w_inv = float8_cast(weight, amax, E4M3, "columns")
        d_x = _gemm(d8, d_inv, w8_t, w_inv, d_out.dtype, gradient=True)
        d_weight = _gemm(d8_t, d_inv, x8_t, x_inv, weight.dtype, gradient=True)
        return d_x, d_weight, None, None


class _MLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        x8, x8_t, x_inv = float8_cast(x, _amax(x, True), E4M3, "both")
        gate_up_amax, down_amax = float8_amax(gate_up), float8_amax(down)
        w8, _, w_inv = float8_cast(gate_up, gate_up_amax, E4M3, "rows")
        between = _gemm(x8, x_inv, w8, w_inv, x.dtype)  # (N, 2 I)
        inner_amax = gated_amax(between, None)
        inner8, inner_inv = gated_cast(between, inner_amax)
        w8, _, w_inv = float8_cast(down, down_amax, E4M3, "rows")
        ctx.save_for_backward(x8_t, x_inv, between, inner_amax, inner_inv, gate_up, gate_up_amax, down, down_amax)
        return _gemm(inner8, inner_inv, w8, w_inv, x.dtype)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (
            x8_t, x_inv, between, inner_amax, inner_inv, gate_up, gate_up_amax, down, down_amax
        ) = ctx.saved_tensors  # fmt: skip
        d_out = d_out.contiguous()
        d8, d8_t, d_inv = float8_cast(d_out, _amax(d_out, True), E5M2, "both")
        _, w8_t, w_inv = float8_cast(down, down_amax, E4M3, "columns")
        d_inner = _gemm(d8, d_inv, w8_t, w_inv, d_out.dtype, gradient=True)
        d_amax = gated_amax(between, d_inner)
        between8, between8_t, between_inv, inner8_t = gated_backward_cast(between, d_inner, d_amax, inner_amax)
        d_down = _gemm(d8_t, d_inv, inner8_t, inner_inv, down.dtype, gradient=True)
        d_gate_up = _gemm(between8_t, between_inv, x8_t, x_inv, gate_up.dtype, gradient=True)
        _, w8_t, w_inv = float8_cast(gate_up, gate_up_amax, E4M3, "columns")
        d_x = _gemm(between8, between_inv, w8_t, w_inv, d_out.dtype, gradient=True)
        return d_x, d_gate_up, d_down


def _amax(x: Tensor, compiled: bool) -> Tensor:
    """The amax of x (N, K), fp32; where compiled code makes x, by rows, which torch.compile fuses into that code."""
    return x.abs().amax(dim=1).amax().float() if compiled else float8_amax(x)


def _gemm(a: Tensor, a_inv: Tensor, b: Tensor, b_inv: Tensor, dtype: torch.dtype, *, gradient: bool = False) -> Tensor:
    """a (M, K) times the transpose of b (N, K), both 8 bits and contiguous, times both inverse scales: (M, N).

    gradient: accumulate in full fp32; without it, Hopper's tensor cores keep fewer bits of the sums.
    """
    if not a.is_cuda:
        return ((a.float() @ b.float().T) * (a_inv * b_inv)).to(dtype)
    return torch._scaled_mm(a, b.T, a_inv, b_inv, out_dtype=dtype, use_fast_accum=not gradient)
