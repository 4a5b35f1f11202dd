"""How long repeated calls take, by the clock of the host or of the device."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch


def host_seconds(call: Callable[[], Any], repetitions: int) -> list[float]:
    """Seconds of each of `repetitions` calls by the host's clock; a call that queues work for a device must wait."""
    seconds = []
    for _ in range(repetitions):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return seconds


def device_seconds(call: Callable[[], Any], device: torch.device, repetitions: int, *, warmup: int = 0) -> list[float]:
    """Seconds of each of `repetitions` calls after `warmup` others, by the clock of `device`.

    The host queues all calls and waits for the last only, so that the device is never idle between them.
    """
    for _ in range(warmup):
        call()
    if device.type != "cuda":
        return host_seconds(call, repetitions)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repetitions + 1)]
    torch.cuda.synchronize(device)
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize(device)
    return [before.elapsed_time(after) / 1e3 for before, after in pairwise(events)]
