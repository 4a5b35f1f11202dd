"""Stochastic rounding of fp32 numbers to bf16 weights: up or down with the probabilities that keep the mean
(arXiv:2010.06192).

Rounding to nearest would lose every update below half an ulp of its weight, and with it most of a warm-up and all
weight decay (docs/benchmarks.md). The random bits are a hash of the weight's number, the number of updates, and the
element's index in the unsharded weight. So a repeated run, a resumed run and a run on another number of processes round
alike, and there is no random generator whose state would have to be saved.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def stochastic_round(x: Tensor, random: Tensor) -> Tensor:
    """x fp32 to bf16: up with the probability x - lower neighbour, in ulps. random: int32; the low 16 bits count."""
    return ((x.view(torch.int32) + (random & 0xFFFF)) & ~0xFFFF).view(torch.float32).bfloat16()


def random_bits(numbers: int, start: Tensor, draw: Tensor) -> Tensor:
    """int32 (numbers,) for so many elements; start, draw: int32, their sum is the hash input of the first element."""
    return hashed(torch.arange(numbers, dtype=torch.int32, device=start.device) + (start + draw))


def hashed(x: Tensor) -> Tensor:
    """int32 to int32: each input bit flips each output bit with probability 1/2 (Chris Wellons's "lowbias32",
    https://nullprogram.com/blog/2018/07/31/)."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B - (1 << 32))):
        x = (x ^ shifted(x, shift)) * factor
    return x ^ shifted(x, 16)


def shifted(x: Tensor, bits: int) -> Tensor:
    """Logical shift to the right."""
    return (x >> bits) & ((1 << (32 - bits)) - 1)


def hash_start(weight: Tensor, number: int) -> Tensor:
    """Hash input of this rank's first element of the weight with this number; int32 scalar on the device."""
    whole = torch.full((), number, dtype=torch.int32, device=weight.device)
    return hashed(hashed(whole) + 1) + _first_element(weight)


def _first_element(weight: Tensor) -> int:
    """Index of this rank's first element in the unsharded weight; FSDP shards by rows, as torch.chunk does."""
    if not isinstance(weight, DTensor):
        return 0
    rows, row = weight.shape[0], weight[0:1].numel()
    for dim, placement in enumerate(weight.placements):
        if placement.is_shard():
            ranks, rank = weight.device_mesh.size(dim), weight.device_mesh.get_local_rank(dim)
            return min(rank * -(-rows // ranks), rows) * row
    return 0
