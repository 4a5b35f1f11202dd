"""Copies of a training state in host memory; buffers are kept from one copy to the next.

With a GPU, large buffers are page-locked (pinned), so that copies run at the bus's full rate; pinning takes seconds,
once, which another thread can spend before the first copy (`prepare`). (torch.distributed.checkpoint's stager does the
same, but failed at its second use with torch 2.11 on an H100.)
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_flatten, tree_unflatten

_PINNED_FROM_BYTES = 1 << 20
"""Smaller buffers may share a page, which cannot be pinned twice."""


class HostCopy:
    """Copies of states that have the same structure; a copy is valid until the next one."""

    def __init__(self, *, from_gpu: bool) -> None:
        self.from_gpu = from_gpu
        self._buffers: dict[int, Tensor] = {}
        self._pinned: list[int] = []
        self._closing = threading.Event()

    def prepare(self, state: dict[str, Any]) -> None:
        """Allocate the buffers for copies of `state`, which is not read; `close_soon` ends it.

        Not while `of` runs."""
        for number, leaf in enumerate(tree_flatten(state)[0]):
            if isinstance(leaf, Tensor) and not self._closing.is_set():
                self._buffer(number, leaf.to_local() if isinstance(leaf, DTensor) else leaf)

    @torch.no_grad()
    def of(self, state: dict[str, Any]) -> dict[str, Any]:
        """`state` with every tensor in host memory; sharded tensors stay sharded."""
        leaves, structure = tree_flatten(state)
        copied = [self._copy(number, leaf) if isinstance(leaf, Tensor) else leaf for number, leaf in enumerate(leaves)]
        if self.from_gpu:
            torch.cuda.synchronize()
        return tree_unflatten(copied, structure)

    def close_soon(self) -> None:
        """Let a `prepare` of another thread end."""
        self._closing.set()

    def close(self) -> None:
        """Free the memory; copies become invalid."""
        for address in self._pinned:
            torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(address))
        self._pinned.clear()
        self._buffers.clear()

    def _copy(self, number: int, tensor: Tensor) -> Tensor:
        if isinstance(tensor, DTensor):  # its local part, in the same wrapping
            names, context = tensor.__tensor_flatten__()
            parts = {name: getattr(tensor, name) for name in names}
            copied = {
                name: self._copy(number, part) if isinstance(part, Tensor) else part for name, part in parts.items()
            }
            return DTensor.__tensor_unflatten__(copied, context, tensor.size(), tensor.stride())
        return self._buffer(number, tensor).copy_(tensor, non_blocking=self.from_gpu)

    def _buffer(self, number: int, like: Tensor) -> Tensor:
        buffer = self._buffers.get(number)
        if buffer is None or buffer.shape != like.shape or buffer.dtype != like.dtype:
            buffer = self._buffers[number] = self._allocate(like)
        return buffer

    def _allocate(self, like: Tensor) -> Tensor:
        buffer = torch.empty(like.shape, dtype=like.dtype)
        if self.from_gpu and buffer.nbytes >= _PINNED_FROM_BYTES:
            torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), buffer.nbytes, 0))
            self._pinned.append(buffer.data_ptr())
        return buffer
