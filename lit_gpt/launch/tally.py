"""Numbers that all ranks put together on the host, in messages that grow with the ranks, not with their square.

gloo's all-reduce sends each number around a ring: so many messages for each rank as there are ranks, one after another.
Here rank 0 collects and tells: two for each rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.distributed as dist


def tally(
    numbers: Sequence[int], how: Literal["sum", "min", "max"] = "sum", group: dist.ProcessGroup | None = None
) -> list[int]:
    """Each of the numbers, over all ranks. A collective of the hosts: every rank calls it, with as many numbers.

    group: of all ranks, with gloo for the host; None: the default group, or a single process.
    """
    own = torch.tensor(numbers, dtype=torch.int64)
    if not dist.is_initialized():
        return [int(number) for number in own]
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size())] if dist.get_rank() == 0 else None
    dist.gather(own, parts, dst=0, group=group)
    if parts is not None:
        together = torch.stack(parts)
        own = together.sum(0) if how == "sum" else together.amin(0) if how == "min" else together.amax(0)
    dist.broadcast(own, src=0, group=group)
    return [int(number) for number in own]
