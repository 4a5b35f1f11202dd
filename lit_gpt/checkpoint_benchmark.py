"""Measurements of saving and loading; what scripts/benchmark_checkpoint.py prints.

The steps between saves are real updates of the model on made rows, as long as asked for: a save that overlaps them
competes for the same cores and, on a GPU, for its copy engine. What a save costs training is the time that the loop
stood in `save`, and the time by which the steps beside the writing were slower than those before.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lit_gpt.args import Settings
from lit_gpt.attention import choose_backend
from lit_gpt.checkpoint import checkpoint_name, load, verified
from lit_gpt.config import Config
from lit_gpt.model import GPT, initialize
from lit_gpt.optim import make_optimizer
from lit_gpt.saver import CheckpointSaver

_SAMPLE_S = 0.005
STEPS_BEFORE = 3
"""Steps whose median is the undisturbed step's time, after one that allocates."""


def measure(
    config: Config, device: torch.device, *, rows: int, block_size: int, work_dir: Path | None
) -> Iterator[dict[str, Any]]:
    """One line for each kind of checkpoint and way to save it, then one for loading it."""
    settings = Settings(model_name=config.name)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.device("meta"):
        model = GPT(config, attention_backend=choose_backend("auto", device), compute_dtype=dtype)
    model.to_empty(device=device)
    initialize(model, settings.seed)
    optimizer = make_optimizer(model, settings)
    ids = torch.arange(rows * (block_size + 1), device=device) % config.vocab_size
    tokens = ids.view(rows, block_size + 1)
    boundaries = torch.arange(rows + 1, dtype=torch.int32, device=device) * block_size

    def step() -> None:
        loss = model(tokens[:, :-1].contiguous(), boundaries, tokens[:, 1:].contiguous())
        (loss / (rows * block_size)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()

    step()
    step_s = statistics.median(_timed(step) for _ in range(STEPS_BEFORE))
    common = {"size": config.name, "device": str(device), "torch": torch.__version__}
    with tempfile.TemporaryDirectory(dir=work_dir) as name:
        for full in (True, False):
            kind = "full" if full else "sharded"
            for overlap in (False, True):
                for line in _measure_saves(Path(name), model, optimizer, step, step_s, full=full, overlap=overlap):
                    yield {**common, "kind": kind, "overlap": overlap, "step_s": round(step_s, 3), **line}
            yield {**common, "kind": kind, **_measure_load(Path(name), model, optimizer)}


def _measure_saves(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    step: Callable[[], None],
    step_s: float,
    *,
    full: bool,
    overlap: bool,
) -> Iterator[dict[str, Any]]:
    """Two saves: the first allocates the copy in host memory, the second finds it there."""
    saver = CheckpointSaver(folder, model, optimizer, full=full, overlap=overlap, keep_last=1)
    for number in (1, 2):
        shutil.rmtree(folder / checkpoint_name(1), ignore_errors=True)
        with PeakMemory() as memory:
            began = time.perf_counter()
            saver.save({"step": 1, "settings": {}})
            blocked_s = time.perf_counter() - began
            steps = 0
            while saver.busy:
                step()
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


def _measure_load(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    path = folder / checkpoint_name(1)
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    with PeakMemory() as memory:
        began = time.perf_counter()
        found = verified(path)
        verified_s = time.perf_counter() - began
        load(found, model, optimizer)
        load_s = time.perf_counter() - began - verified_s
    return {
        "what": "load", "bytes": size, "verify_s": round(verified_s, 2), "load_s": round(load_s, 2), **memory.peaks,
    }  # fmt: skip


def _timed(call: Callable[[], None]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


class PeakMemory:
    """Peaks above the state at its beginning, in GB: of this process's resident memory, and of the GPU's."""

    def __enter__(self) -> PeakMemory:
        self.peaks: dict[str, float] = {}
        self._begin = self._peak = _resident_bytes()
        self._done = threading.Event()
        self._watcher = threading.Thread(target=self._watch)
        self._watcher.start()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            self._gpu_begin = torch.cuda.memory_allocated()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._watcher.join()
        self.peaks["host_extra_gb"] = round((self._peak - self._begin) / 1e9, 2)
        if torch.cuda.is_available():
            self.peaks["gpu_extra_gb"] = round((torch.cuda.max_memory_allocated() - self._gpu_begin) / 1e9, 2)

    def _watch(self) -> None:
        while not self._done.wait(_SAMPLE_S):
            self._peak = max(self._peak, _resident_bytes())


def _resident_bytes() -> int:
    """Anonymous memory of this process: the file cache that a memory-mapped load touches is not counted."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024
