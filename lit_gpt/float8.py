"""Float8 linears: the blocks' products of matrices in 8 bits, through torchao.

Weights, their gradients and the optimizer stay what `precision` makes them; operands are scaled and cast to 8 bits for
each product, embedding, head, norms and attention are left alone. Two recipes of torchao's:

    tensorwise  one scale a tensor: measured in docs/benchmarks.md
    rowwise     one scale a row: small values beside large ones keep more digits; not measured on a GPU
"""

from __future__ import annotations

import importlib
from dataclasses import replace

import torch
from torch import nn

from lit_gpt.cli import BadInput

MULTIPLE = 16
"""Both sides of a float8 product must be multiples of this."""


def use_float8(blocks: nn.ModuleList, recipe: str, device: torch.device) -> None:
    """Exchange every linear of `blocks` for torchao's; their weights keep names and values.

    Raises BadInput where the device has no 8-bit products, torchao is missing, or a width does not divide.
    """
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise BadInput(f"--float8 {recipe}: {torch.cuda.get_device_name(device)} has no float8. Valid here: none")
    try:
        torchao = importlib.import_module("torchao.float8")
    except ImportError as error:
        raise BadInput(
            f"--float8 {recipe}: torchao does not import ({error}). Install it: pip install -e '.[float8]'"
        ) from None
    for name, linear in blocks.named_modules():
        if isinstance(linear, nn.Linear) and (linear.in_features % MULTIPLE or linear.out_features % MULTIPLE):
            raise BadInput(
                f"--float8 {recipe}: {name} is {linear.out_features} x {linear.in_features}, no multiples of {MULTIPLE}"
            )
    config = torchao.Float8LinearConfig.from_recipe_name(recipe)
    if device.type == "cpu":
        config = replace(config, emulate=True)  # 8-bit numbers multiplied in full precision
    torchao.convert_to_float8_training(blocks, config=config)
