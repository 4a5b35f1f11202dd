"""Whether all copies of the weights are the same: where HYBRID_SHARD and NO_SHARD keep several, they are compared.

Copies begin equal, see the same gradients and so stay equal, bit by bit; nothing in training would notice if they did
not (a GPU that computes wrong, a bit that flips in memory, another version of a library on one node). A checkpoint
holds one of them. So they are compared before the first step, and before each save.
Costs: each rank reads its weights and moments once (its hash waits for the device), and sends 8 bytes over gloo.
Nothing where there is one copy.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

_FACTOR = 6364136223846793005
"""Odd, so that no bit is lost (Knuth's MMIX generator)."""


class CopiesDiffer(Exception):
    """The message is one line that names the ranks."""


def require_equal_copies(optimizer: torch.optim.Optimizer, copies: int, name: str) -> None:
    """Raise CopiesDiffer, on every rank, unless all copies of weights and optimizer state have the same bits.

    copies: how many there are, each on as many neighbouring ranks; name: of this rank. A collective: every rank calls
    it.
    """
    if copies == 1:
        return
    own = hash_of(state_tensors(optimizer)).cpu()
    hashes = [torch.zeros_like(own) for _ in range(dist.get_world_size())] if dist.get_rank() == 0 else None
    dist.gather(own, hashes)
    found = [odd_ranks([int(value) for value in hashes or ()], copies)]
    dist.broadcast_object_list(found)
    (odd,) = found
    if not odd:
        return
    names: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(names, name)
    raise CopiesDiffer(
        f"the weights or moments of {'; '.join(names[rank] for rank in odd)} are not those of the other copies: a GPU "
        "that computes wrong, or other packages there. Nothing was saved. Check the node (scripts/check_node.py), and "
        "go on from the last checkpoint with --resume auto"
    )


def odd_ranks(hashes: Sequence[int], copies: int) -> list[int]:
    """The ranks whose hash is not that of most ranks with the same part of the weights, or of the first of them where
    no hash is the most frequent."""
    shards = len(hashes) // copies
    odd = []
    for shard in range(shards):
        ranks = range(shard, len(hashes), shards)
        usual, _ = Counter(hashes[rank] for rank in ranks).most_common(1)[0]  # of equals the one that came first
        odd += [rank for rank in ranks if hashes[rank] != usual]
    return sorted(odd)


def state_tensors(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """This rank's part of weights and optimizer state, in an order that all ranks share. (A validation leaves some of
    the model's own parameters gathered.)"""
    for weight in (weight for group in optimizer.param_groups for weight in group["params"]):
        state = sorted(optimizer.state.get(weight, {}).items())
        yield from (_local(value) for _, value in [("", weight), *state] if isinstance(value, Tensor))


def _local(tensor: Tensor) -> Tensor:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


@torch.no_grad()
def hash_of(tensors: Iterator[Tensor]) -> Tensor:
    """An int64 hash of all bits of the tensors, as a scalar on their device.

    Each row's hash_tensor (the exclusive or of its values as 64-bit floats, a map without collisions) is mixed with the
    row's place, and summed; each tensor's sum is mixed with those before it. So a change of one value always changes
    the hash, wherever it is.
    """
    found: Tensor | None = None
    for tensor in tensors:
        rows = torch.hash_tensor(tensor.flatten(1) if tensor.dim() > 1 else tensor.reshape(-1, 1), 1).view(torch.int64)
        own = _mixed(_mixed(rows) + torch.arange(len(rows), device=tensor.device)).sum()
        found = own if found is None else _mixed(found.to(own.device)) + own
    assert found is not None
    return found


def _mixed(x: Tensor) -> Tensor:
    """One-to-one on int64; low bits of the result depend on high ones of x, as those of a float's values are 0."""
    return (x ^ ((x >> 32) & 0xFFFFFFFF)) * _FACTOR
