"""Float8: the blocks' products of matrices in 8 bits. Embedding, head, norms and attention are left alone.

Weights, their gradients and the optimizer stay what `precision` makes them; operands are scaled and cast to 8 bits for
each product: values to e4m3 (3 bits after the point), gradients to e5m2 (2 bits, a wider range). Two recipes:

    tensorwise  one scale a tensor, from its largest absolute value at that moment: nothing to remember between steps.
                Ours: each tensor is read once for its scale and once for both layouts that its products need, or the
                code that makes it finds the scale; between gate, up and down nothing but the first product's output
                is written in more than 8 bits. torchao's, which this one agrees with, spends on casts two thirds
                of what its products gain (docs/benchmarks.md)
    rowwise     torchao's: one scale a row, so that small values beside large ones keep more digits
"""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lit_gpt.cli import BadInput
from lit_gpt.model.float8_triton import (
    E4M3,
    E5M2,
    absolute_max,
    float8_cast,
    gated_absolute_max,
    gated_backward_cast,
    gated_cast,
)
from lit_gpt.model.gpt import Block, Linear

# Shapes: N tokens, C width, I MLP width; of a product (M, K) with (N, K).

MULTIPLE = 16
"""Both sides of a float8 product must be multiples of this."""


def use_float8(blocks: nn.ModuleList, recipe: str, device: torch.device) -> None:
    """Make the products of `blocks` float8; weights keep their names and values.

    Raises BadInput where the device has no 8-bit products, torchao is missing, or a width does not divide.
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
    """A linear whose three products are float8, tensorwise, with the weight of another.

    compiled_input, compiled_gradient: whether compiled code makes that tensor, which then finds its scale on the way.
    """

    def __init__(self, linear: Linear, *, compiled_input: bool = False, compiled_gradient: bool = False) -> None:
        super(nn.Linear, self).__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = linear.weight
        self.register_parameter("bias", None)
        self.compiled_input, self.compiled_gradient = compiled_input, compiled_gradient

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, -2)
        return _Product.apply(flat, self.weight, self.compiled_input, self.compiled_gradient).unflatten(0, x.shape[:-1])


def float8_mlp(x: Tensor, residual: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """fused_mlp.fused_mlp with float8 products: x and residual (N, C), gate_up (2 I, C), down (C, I): (N, C)."""
    return residual + _MLP.apply(x, gate_up, down)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, compiled_input: bool, compiled_gradient: bool) -> Tensor:
        x8, x8_turned, x_unscale = float8_cast(x, _largest(x, compiled_input), E4M3, "both")
        largest = absolute_max(weight)
        w8, _, w_unscale = float8_cast(weight, largest, E4M3, "rows")
        ctx.save_for_backward(x8_turned, x_unscale, weight, largest)
        ctx.compiled_gradient = compiled_gradient
        return _product(x8, x_unscale, w8, w_unscale, x.dtype)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x8_turned, x_unscale, weight, largest = ctx.saved_tensors
        d_out = d_out.contiguous()
        d8, d8_turned, d_unscale = float8_cast(d_out, _largest(d_out, ctx.compiled_gradient), E5M2, "both")
        _, w8_turned, w_unscale = float8_cast(weight, largest, E4M3, "columns")
        d_x = _product(d8, d_unscale, w8_turned, w_unscale, d_out.dtype, gradient=True)
        d_weight = _product(d8_turned, d_unscale, x8_turned, x_unscale, weight.dtype, gradient=True)
        return d_x, d_weight, None, None


class _MLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        x8, x8_turned, x_unscale = float8_cast(x, _largest(x, True), E4M3, "both")
        gate_up_largest, down_largest = absolute_max(gate_up), absolute_max(down)
        w8, _, w_unscale = float8_cast(gate_up, gate_up_largest, E4M3, "rows")
        between = _product(x8, x_unscale, w8, w_unscale, x.dtype)  # (N, 2 I)
        inner_largest = gated_absolute_max(between, None)
        inner8, inner_unscale = gated_cast(between, inner_largest)
        w8, _, w_unscale = float8_cast(down, down_largest, E4M3, "rows")
        ctx.save_for_backward(
            x8_turned, x_unscale, between, inner_largest, inner_unscale, gate_up, gate_up_largest, down, down_largest
        )
        return _product(inner8, inner_unscale, w8, w_unscale, x.dtype)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (
            x8_turned, x_unscale, between, inner_largest, inner_unscale, gate_up, gate_up_largest, down, down_largest
        ) = ctx.saved_tensors  # fmt: skip
        d_out = d_out.contiguous()
        d8, d8_turned, d_unscale = float8_cast(d_out, _largest(d_out, True), E5M2, "both")
        _, w8_turned, w_unscale = float8_cast(down, down_largest, E4M3, "columns")
        d_inner = _product(d8, d_unscale, w8_turned, w_unscale, d_out.dtype, gradient=True)
        d_largest = gated_absolute_max(between, d_inner)
        between8, between8_turned, between_unscale, inner8_turned = gated_backward_cast(
            between, d_inner, d_largest, inner_largest
        )
        d_down = _product(d8_turned, d_unscale, inner8_turned, inner_unscale, down.dtype, gradient=True)
        d_gate_up = _product(between8_turned, between_unscale, x8_turned, x_unscale, gate_up.dtype, gradient=True)
        _, w8_turned, w_unscale = float8_cast(gate_up, gate_up_largest, E4M3, "columns")
        d_x = _product(between8, between_unscale, w8_turned, w_unscale, d_out.dtype, gradient=True)
        return d_x, d_gate_up, d_down


def _largest(x: Tensor, compiled: bool) -> Tensor:
    """Largest absolute value of x (N, K), fp32: by rows where compiled code makes x, which needs no reading then."""
    return x.abs().amax(dim=1).amax().float() if compiled else absolute_max(x)


def _product(
    a: Tensor, a_unscale: Tensor, b: Tensor, b_unscale: Tensor, dtype: torch.dtype, *, gradient: bool = False
) -> Tensor:
    """a (M, K) times the transpose of b (N, K), both of 8 bits and contiguous, with their scales undone: (M, N).

    A gradient's sums are carried in full fp32; elsewhere Hopper's tensor cores keep fewer bits of them.
    """
    if not a.is_cuda:
        return ((a.float() @ b.float().T) * (a_unscale * b_unscale)).to(dtype)
    return torch._scaled_mm(a, b.T, a_unscale, b_unscale, out_dtype=dtype, use_fast_accum=not gradient)
