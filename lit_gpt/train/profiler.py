"""Profiles some steps of a run by torch.profiler: a trace, a table of kernels, a snapshot of GPU memory.

    <run folder>/profile/steps-A-B.trace.json.gz    for chrome://tracing or ui.perfetto.dev
    <run folder>/profile/steps-A-B.kernels.txt      time by operator and kernel
    <run folder>/profile/steps-A-B.memory.pickle    for pytorch.org/memory_viz; on GPUs

Costs: profiled steps are slower.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from lit_gpt.datapoints.line_log import or_alarm
from lit_gpt.files import discard, publish
from lit_gpt.train.settings import step_range

log = logging.getLogger(__name__)

_MEMORY_EVENTS = 1_000_000
_TABLE_ROWS = 50


class StepProfiler:
    """Profiles the steps "A:B" (settings.profile_steps); does nothing if `steps` is None."""

    def __init__(self, steps: str | None, run_dir: Path, device: torch.device) -> None:
        self._first, self._end = step_range(steps) if steps else (-1, -1)
        self._folder = run_dir / "profile"
        self._device = device
        self._running: profile | None = None

    def before_step(self, step: int) -> None:
        """Called before update number `step`, from 1: starts or stops the profile if it is due."""
        if step == self._first:
            self._start()
        elif self._running is not None and step == self._end:
            self.stop()

    def _start(self) -> None:
        activities = [ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=_MEMORY_EVENTS)
        self._running = profile(activities=activities, record_shapes=True)
        self._running.start()

    def stop(self) -> None:
        """End a running profile, also before its last step, and write its files."""
        running, self._running = self._running, None
        if running is None:
            return
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        running.stop()
        or_alarm(self._folder, lambda: self._write(running))
        if self._device.type == "cuda":
            torch.cuda.memory._record_memory_history(enabled=None)

    def _write(self, running: profile) -> None:
        self._folder.mkdir(exist_ok=True)
        stem = str(self._folder / f"steps-{self._first}-{self._end}")
        for ending in ("trace.json.gz", "memory.pickle"):  # torch would write through a link there
            discard(Path(f"{stem}.{ending}"))
        running.export_chrome_trace(f"{stem}.trace.json.gz")
        order = "self_cuda_time_total" if self._device.type == "cuda" else "self_cpu_time_total"
        table = running.key_averages().table(sort_by=order, row_limit=_TABLE_ROWS)
        publish(Path(f"{stem}.kernels.txt"), [table.encode()])
        if self._device.type == "cuda":
            torch.cuda.memory._dump_snapshot(f"{stem}.memory.pickle")
        log.info("profile of steps %d to %d: %s.*", self._first, self._end - 1, stem)
