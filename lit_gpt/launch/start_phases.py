"""Where the seconds go between the command, or the fault that another start mends, and the end of the first step."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

from torch import Tensor

from lit_gpt.launch.job import last_fault

log = logging.getLogger(__name__)


class StartPhases:
    """The moments at which the parts of a start end, in seconds since the epoch: its begin lies in another process."""

    def __init__(self) -> None:
        """Called when PyTorch and the program's modules are loaded."""
        began = process_start()
        self._ends: list[tuple[str, float]] = [("", began)]
        fault = last_fault()
        if fault is not None:
            self._ends = [("", fault["at"]), ("end of the old ranks", fault["ended_at"]), ("launch", began)]
        self._told = False
        self._since = "the command" if fault is None else "the fault"
        self.end("imports")

    def end(self, phase: str) -> None:
        """This phase is over."""
        self._ends.append((phase, time.time()))

    def step_done(self, on_device: Tensor) -> None:
        """After the first step, for whose end on the device this waits, log what the start took."""
        if not self._told:
            self._told = True
            on_device.cpu()
            self.end("first step")
            log.info("first step done %s", self.in_words())

    def in_words(self) -> str:
        """Each phase with its seconds, and their sum."""
        pairs = zip(self._ends, self._ends[1:], strict=False)
        parts = ", ".join(f"{phase} {end - begin:.1f}" for (_, begin), (phase, end) in pairs)
        return f"{self._ends[-1][1] - self._ends[0][1]:.1f} s since {self._since}: {parts}"


def process_start() -> float:
    """When this process began, to 10 ms; where there is no /proc, now."""
    stat = Path("/proc/self/stat")
    if not stat.exists():
        return time.time()
    ticks = int(stat.read_text().rsplit(")", 1)[1].split()[19])
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + ticks / os.sysconf("SC_CLK_TCK")
