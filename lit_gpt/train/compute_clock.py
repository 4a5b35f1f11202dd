"""How long this rank computes, without the waits for other ranks: the time in its blocks' forward passes.

A step takes all ranks the same time, since they wait for each other; what differs is the time between the waits. FSDP
waits for a block's weights in a hook before the block's forward pass, and communicates again in a hook after it. The
clock's hooks lie between the two, so two events on the stream that computes enclose the kernels of a block alone. (In
the backward pass, which has the same kernels twice, the waits cannot be told apart.) On CPUs it is the thread's CPU
time, in which another program on the same core does not count.

Passes without gradients (validation, samples) are left out, and so are recomputed ones.
Costs: two events for each block and micro-batch, some us of the host, while the GPU computes; nothing waits for it.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn


class ComputeClock:
    """Measures the blocks of a sharded model; to be made after it is sharded."""

    def __init__(
        self, blocks: Iterable[nn.Module], device: torch.device, now: Callable[[], float] = time.thread_time
    ) -> None:
        """now: seconds, on CPUs."""
        self._on_gpu, self._now = device.type == "cuda", now
        self._queued: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._free: list[torch.cuda.Event] = []
        self._began: Any = None
        self._begun = self._passes_of_a_step = 0
        self._seconds, self._passes = 0.0, 0
        for block in blocks:
            # torch.compile leaves them out of its graph, as it does FSDP's
            block.register_forward_pre_hook(torch.compiler.disable(self._begin))  # after FSDP's
            block.register_forward_hook(torch.compiler.disable(self._end), prepend=True)  # before FSDP's

    def step_done(self) -> None:
        """Add up what the GPU has finished."""
        self._begun, self._passes_of_a_step = 0, self._begun
        while self._queued and self._queued[0][1].query():
            began, ended = self._queued.popleft()
            self._add(began.elapsed_time(ended) / 1000)
            self._free += [began, ended]

    def take(self) -> float:
        """Seconds a step, of the passes added up since the last call; NaN if there are none."""
        seconds = self._seconds / self._passes * self._passes_of_a_step if self._passes else math.nan
        self._seconds, self._passes = 0.0, 0
        return seconds

    def _begin(self, *_: Any) -> None:
        self._began = None
        if torch.is_grad_enabled():
            self._begun += 1
            self._began = self._event() if self._on_gpu else self._now()

    def _end(self, *_: Any) -> None:
        if self._began is None:
            return
        if self._on_gpu:
            self._queued.append((self._began, self._event()))
        else:
            self._add(self._now() - self._began)

    def _add(self, seconds: float) -> None:
        self._seconds += seconds
        self._passes += 1

    def _event(self) -> torch.cuda.Event:
        event = self._free.pop() if self._free else torch.cuda.Event(enable_timing=True)
        event.record()
        return event
