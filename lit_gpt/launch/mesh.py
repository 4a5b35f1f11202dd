"""The device mesh of a run: which ranks hold the same weights, and which share one copy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh


def make_mesh(device_type: str, shape: Mapping[str, int], timeout: timedelta) -> DeviceMesh:
    """The mesh of all ranks with these dimensions (name -> size); neighbouring ranks differ in the last. A collective.

    A dimension of all ranks is the group of all; the others are new groups, with its backends and this timeout.
    init_device_mesh gives them PyTorch's own timeouts, and on GPUs splits them from the group of all, at which gloo
    warns on every rank that NCCL's options are not its own.
    """
    sizes = tuple(shape.values())
    ranks = torch.arange(math.prod(sizes)).view(sizes)
    groups = []
    for dim, size in enumerate(sizes):
        for members in ranks.movedim(dim, -1).reshape(-1, size).tolist():  # every rank makes every group
            group = dist.group.WORLD if size == ranks.numel() else dist.new_group(members, timeout=timeout)
            if isinstance(group, dist.ProcessGroup):  # this rank is a member
                groups.append(group)
    return DeviceMesh.from_group(groups, device_type, ranks, mesh_dim_names=tuple(shape))
