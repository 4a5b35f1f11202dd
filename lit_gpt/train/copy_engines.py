"""All-gathers of weights by the GPUs' copy engines, which leave the multiprocessors to the model.

NCCL does so from version 2.28 on, between GPUs of one host, where the gathered weights lie in symmetric memory and its
policy is to take no multiprocessor (https://docs.pytorch.org/docs/2.11/symmetric_memory.html#copy-engine-collectives).
Its own kernels take some beside the model's products, for as long as the transfer lasts. docs/benchmark_log.md has
numbers. The program chooses that policy for a run on one node; with NCCL_CTA_POLICY=0 in the environment it keeps to
kernels.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import _symmetric_memory as symmetric_memory
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule

from lit_gpt.launch.job import host
from lit_gpt.launch.world import takes_no_multiprocessor

log = logging.getLogger(__name__)

TRIAL_NUMBERS = 1 << 20
"""Of each rank, in the trial."""


class CopyEngineAllGather:
    """What FSDP2 allocates and calls in place of its own all-gather (FSDPModule.set_custom_all_gather)."""

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """From a pool that keeps freed memory: each rank allocates the same sizes in the same order."""
        with torch.cuda.use_mem_pool(symmetric_memory.get_mem_pool(device)):
            return torch.empty(size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> Any:
        symmetric_memory.rendezvous(output_tensor, group=group.group_name)  # known already, unless it is new memory
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.13
        return gather(output_tensor, input_tensor, group=group, async_op=async_op)


def gather_by_copy_engines(model: nn.Module, mesh: DeviceMesh) -> None:
    """Let all FSDP units of `model` gather by copy engines, if NCCL's policy asks for it and it works here.

    mesh: its last dimension are the ranks that share one copy of the weights. A collective.
    """
    group = mesh.get_group(mesh.ndim - 1)
    if mesh.device_type != "cuda" or group.size() == 1 or not takes_no_multiprocessor():
        return
    why = why_not(group, torch.device("cuda", torch.cuda.current_device()))
    if why is None:
        for unit in model.modules():
            if isinstance(unit, FSDPModule):
                unit.set_custom_all_gather(cast(Any, CopyEngineAllGather()))  # the protocol's module is private
        log.info("weights are gathered by the GPUs' copy engines")
    else:
        log.info("weights are gathered by NCCL's kernels, not by the GPUs' copy engines: %s", why)


def why_not(group: dist.ProcessGroup, device: torch.device) -> str | None:
    """Why copy engines cannot gather for some rank of `group`, in words for a user; None if they can.

    They are tried only where nothing else speaks against them, on every rank. A collective.
    """
    return _first(group, _unfit(group, device)) or _first(group, _trial(group, device))


def _unfit(group: dist.ProcessGroup, device: torch.device) -> str | None:
    hosts: list[str] = [""] * group.size()
    dist.all_gather_object(hosts, host(), group)
    if len(set(hosts)) > 1:
        return f"one copy of the weights lies on {len(set(hosts))} hosts"
    if torch.cuda.nccl.version() < (2, 28):
        return f"NCCL {'.'.join(map(str, torch.cuda.nccl.version()))} is older than 2.28"
    if not hasattr(symmetric_memory, "get_mem_pool"):
        return f"torch {torch.__version__} has no pool of symmetric memory"
    others = (n for n in range(torch.cuda.device_count()) if n != device.index)
    if not all(torch.cuda.can_device_access_peer(device, other) for other in others):
        return f"{device} has no direct access to the other GPUs"
    return None


def _trial(group: dist.ProcessGroup, device: torch.device) -> str | None:
    """Why a small all-gather fails, compared with what it must give; None if it is right."""
    rank, size = group.rank(), group.size()
    try:
        symmetric_memory.set_backend("NCCL")
        dist.barrier(group=group, device_ids=[device.index])  # the communicator must exist
        # On a stream of its own, as FSDP2's gathers are: CUDA's batched copies refuse the default stream.
        with torch.cuda.stream(torch.cuda.Stream(device)):
            gather = CopyEngineAllGather()
            all_numbers = gather.allocate((size * TRIAL_NUMBERS,), dtype=torch.bfloat16, device=device)
            own = all_numbers.view(size, TRIAL_NUMBERS)[rank].fill_(rank + 1)
            gather(all_numbers, own, group)
            means = all_numbers.view(size, TRIAL_NUMBERS).float().mean(1).tolist()
    except (RuntimeError, AttributeError) as error:
        return f"a small all-gather fails: {str(error).splitlines()[0]}"
    wanted = [float(n + 1) for n in range(size)]
    return None if means == wanted else f"a small all-gather gives {means} for {wanted}"


def _first(group: dist.ProcessGroup, why: str | None) -> str | None:
    """The first rank's answer that is not None."""
    answers: list[str | None] = [None] * group.size()
    dist.all_gather_object(answers, why, group)
    return next((answer for answer in answers if answer is not None), None)
