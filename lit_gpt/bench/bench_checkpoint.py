"""Measurements of saving and loading; what scripts/benchmark_checkpoint.py prints.

Between saves run the training program's own steps, compiled where training compiles (bench_step.StepBench): a save that
overlaps them competes for the same cores and for the GPU's copy engine. A save costs training the time that the loop
waits in `save`, and the time by which steps are slower while it writes.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lit_gpt.bench.bench_step import StepBench
from lit_gpt.bench.timing import host_seconds
from lit_gpt.checkpoint.checkpoint import load, verified
from lit_gpt.checkpoint.record import checkpoint_name
from lit_gpt.checkpoint.saver import CheckpointSaver
from lit_gpt.train.settings import StepSettings

_SAMPLE_S = 0.005
_KIND = {False: "sharded", True: "full"}
WARMUP_STEPS = 2
STEPS_BEFORE = 5
"""Steps after the warm-up, whose median is the time of an undisturbed step."""


def measure(settings: StepSettings, *, work_dir: Path | None) -> Iterator[dict[str, Any]]:
    """A line for the step; for each kind of checkpoint, saved beside training and loaded; then without overlap."""
    if work_dir is not None:
        work_dir.mkdir(parents=True, exist_ok=True)
    bench = StepBench(settings)
    for _ in range(WARMUP_STEPS):
        _step(bench)
    with PeakMemory(bench.device) as memory:
        step_s = statistics.median(host_seconds(partial(_step, bench), STEPS_BEFORE))
    bench.require_updates()
    common = {"size": settings.model_name, "device": str(bench.device), "torch": torch.__version__}
    yield {
        **common, "what": "step", "rows": settings.global_batch_size, "precision": settings.precision,
        "step_s": round(step_s, 3), **memory.peaks,
    }  # fmt: skip
    with tempfile.TemporaryDirectory(dir=work_dir) as name:
        for full in (False, True):
            for line in _measure_saves(Path(name), bench, step_s, full=full, overlap=True):
                yield {**common, "kind": _KIND[full], "overlap": True, **line}
            yield {**common, "kind": _KIND[full], **_measure_load(Path(name), bench)}
        for full in (False, True):
            for line in _measure_saves(Path(name), bench, step_s, full=full, overlap=False):
                yield {**common, "kind": _KIND[full], "overlap": False, **line}


def _step(bench: StepBench) -> None:
    bench.step()
    bench.synchronize()


def _measure_saves(
    folder: Path, bench: StepBench, step_s: float, *, full: bool, overlap: bool
) -> Iterator[dict[str, Any]]:
    """With overlap two saves: the first allocates the copy in host memory, the second reuses it."""
    saver = CheckpointSaver(folder, bench.model, bench.optimizer, full=full, overlap=overlap, keep_last=1)
    for number in (1, 2) if overlap else (1,):
        shutil.rmtree(folder / checkpoint_name(1), ignore_errors=True)
        with PeakMemory(bench.device) as memory:
            began = time.perf_counter()
            saver.save({"step": 1, "settings": {}})
            blocked_s = time.perf_counter() - began
            steps = 0
            while saver.busy:
                _step(bench)
                steps += 1
            whole_s = time.perf_counter() - began
            saver.wait()
        if saver.failure:
            raise OSError(saver.failure)
        slowed_s = max(0.0, whole_s - blocked_s - steps * step_s)
        yield {
            "what": "save", "number": number, "whole_s": round(whole_s, 2), "blocked_s": round(blocked_s, 3),
            "steps_beside": steps, "slowed_s": round(slowed_s, 2),
            "stall_in_steps": round((blocked_s + slowed_s) / step_s, 2), **memory.peaks,
        }  # fmt: skip
    saver.close()


def _measure_load(folder: Path, bench: StepBench) -> dict[str, Any]:
    path = folder / checkpoint_name(1)
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    with PeakMemory(bench.device) as memory:
        began = time.perf_counter()
        found = verified(path)
        verified_s = time.perf_counter() - began
        load(found, bench.model, bench.optimizer)
        bench.synchronize()
        load_s = time.perf_counter() - began - verified_s
    return {
        "what": "load", "bytes": size, "verify_s": round(verified_s, 2), "load_s": round(load_s, 2), **memory.peaks,
    }  # fmt: skip


class PeakMemory:
    """Peaks in GB: of this process's resident memory, above what it had at the start; of the GPU's memory in all."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.peaks: dict[str, float] = {}

    def __enter__(self) -> PeakMemory:
        self._begin = self._peak = _resident_bytes()
        self._done = threading.Event()
        self._watcher = threading.Thread(target=self._watch)
        self._watcher.start()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._watcher.join()
        self.peaks["host_extra_gb"] = round((self._peak - self._begin) / 1e9, 2)
        if self._device.type == "cuda":
            self.peaks["gpu_gb"] = round(torch.cuda.max_memory_allocated(self._device) / 1e9, 2)

    def _watch(self) -> None:
        while not self._done.wait(_SAMPLE_S):
            self._peak = max(self._peak, _resident_bytes())


def _resident_bytes() -> int:
    """Anonymous memory of this process: the file cache that a memory-mapped load touches is not counted."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024
