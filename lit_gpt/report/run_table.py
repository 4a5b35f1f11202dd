"""A line for each run: what scripts/runs.py shows, and looks at again and again.

A run's step is that of its last line of metrics, or of the heartbeat that is younger.
Costs: for each run its settings, rank 0's heartbeat, the end of metrics.csv and a listing of the folder; no log.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lit_gpt.checkpoint.record import MANIFEST, NAME
from lit_gpt.cli import BadInput
from lit_gpt.config import REGISTRY
from lit_gpt.report import metrics
from lit_gpt.report.life import State, life_of, read_beats
from lit_gpt.report.numbers import about, short
from lit_gpt.report.run_view import MARKS, read_mappings

TAIL_BYTES = 1 << 16
DEPTH = 3
"""Levels below a given folder at which runs are looked for."""
COLUMNS = ("run", "model", "state", "step", "loss", "val loss", "tokens/s", "MFU", "last sign of life")


class RunLine(NamedTuple):
    """A run in one line."""

    folder: Path
    model: str
    """Its name and, if it is registered, its number of parameters."""
    state: State
    step: int
    max_steps: int | None
    loss: float | None
    val_loss: float | None
    tokens_per_s: float | None
    mfu: float | None
    last_sign: float | None
    """Seconds since 1970."""

    def cells(self, now: float) -> list[str]:
        """As text, in the order of COLUMNS."""
        of = f"/{self.max_steps:,}" if self.max_steps else ""
        return [
            str(self.folder), self.model, self.state, f"{self.step:,}{of}", _decimals(self.loss),
            _decimals(self.val_loss), "" if self.tokens_per_s is None else f"{self.tokens_per_s:,.0f}",
            "" if self.mfu is None else f"{self.mfu:.1%}",
            "" if self.last_sign is None else f"{about(max(0, round(now - self.last_sign)))} ago",
        ]  # fmt: skip

    def fields(self) -> dict[str, object]:
        """As JSON."""
        return {**self._asdict(), "folder": str(self.folder)}


def find_runs(folders: Iterable[Path]) -> Iterator[Path]:
    """The run folders among `folders` and below them; BadInput for a folder that does not exist."""
    for folder in folders:
        if not folder.is_dir():
            raise BadInput(f"{folder}: no such folder; give run folders, or folders that hold some (default: out)")
        yield from _below(folder, DEPTH)


def _below(folder: Path, depth: int) -> Iterator[Path]:
    if any((folder / mark).exists() for mark in MARKS):
        yield folder
    elif depth:
        try:
            inner = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
        except OSError:  # another user's
            return
        for path in inner:
            yield from _below(path, depth - 1)


def run_line(folder: Path, now: float | None = None) -> RunLine:
    """The line of a run folder, whatever it lacks."""
    settings, resolved = read_mappings(folder)
    tail = metrics.read(folder / "metrics.csv", TAIL_BYTES)
    beats = read_beats(folder / "watchdog", world_size=1)  # of thousands, one tells
    steps = [int(name[1]) for path in folder.glob("iter-*") if (name := NAME.fullmatch(path.name)) and _whole(path)]
    limit = resolved.get("max_steps", settings.get("max_steps"))
    max_steps = limit if isinstance(limit, int) else None
    times = tail.times[np.isfinite(tail.times)][-2:].tolist()
    since = [beat.step for beat in beats if beat.time > max(times, default=0.0)]
    step = int(max([tail.last("step") or 0, *since]))
    life = life_of(beats, step, max_steps, max(steps, default=None), times, settings.get("watchdog_floor_s"), now)
    return RunLine(
        folder, model_of(settings, resolved), life.state, step, max_steps, tail.last("loss"), tail.last("val_loss"),
        tail.last("tokens_per_s"), tail.last("mfu"), life.last_sign,
    )  # fmt: skip


def model_of(settings: dict[str, Any], resolved: dict[str, Any]) -> str:
    """The model's name and, if it is registered, its number of parameters; ? if the settings do not say."""
    name, vocabulary = str(settings.get("model_name") or "?"), resolved.get("vocab_size")
    if name not in REGISTRY:
        return name
    shape = REGISTRY[name] if not isinstance(vocabulary, int) else replace(REGISTRY[name], vocab_size=vocabulary)
    return f"{name} ({short(shape.parameters)})"


def text_table(lines: Sequence[RunLine], now: float | None = None) -> str:
    """Columns of text, for a screen that is no terminal."""
    rows = [list(COLUMNS), *(line.cells(time.time() if now is None else now) for line in lines)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _whole(checkpoint: Path) -> bool:
    return (checkpoint / MANIFEST).is_file()


def _decimals(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
