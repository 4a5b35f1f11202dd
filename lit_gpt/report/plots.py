"""Plots of a page: lines over steps, and histograms. A script on the page draws them (assets/page.js, uPlot).

Invariant: a line of any length becomes about `points` points, and none of its extremes is lost: each stretch keeps its
smallest and its largest value, and its first that is not finite, which is a gap.
Costs: a million values are thinned in some 10 ms; 2,000 points are some 40 kB of the page.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lit_gpt.report.blocks import COLOURS, Kind, escape

Position: TypeAlias = ArrayLike | Mapping[str, ArrayLike]
"""Where on the horizontal axis: numbers, or for each of the plot's axes its numbers: {"step": ..., "tokens": ...}."""
POINTS = 2000


@dataclass(frozen=True)
class Line:
    """A series. x: as `Position`, rising; y: as many numbers, NaN where there is none."""

    name: str
    x: Position
    y: ArrayLike
    style: Literal["line", "dashed", "points", "faint"] = "line"
    """points: a line with a dot at each value."""
    colour: int | None = None
    """Number of the colour; default: the line's place in its plot."""


@dataclass(frozen=True)
class Mark:
    """A vertical line at `x`, which the pointer explains."""

    x: float | Mapping[str, float]
    label: str
    kind: Kind = "plain"


@dataclass(frozen=True)
class Plot:
    """Lines over a common axis, to zoom (drag) and read (pointer); a page's plots of one axis show the same pointer."""

    title: str
    lines: Sequence[Line]
    x_label: str = "step"
    """Of lines whose x is an array; else the keys of x are the labels, and the page offers a choice."""
    y_label: str = ""
    marks: Sequence[Mark] = ()
    log_y: bool = False
    log_x: bool = False
    points: int = POINTS
    note: str = ""
    zero: bool = False
    """Whether the vertical axis begins at 0."""

    def html(self, data: list[dict[str, Any]]) -> str:
        series = [self._series(line, number) for number, line in enumerate(self.lines)]
        notes = [self.note] if self.note else []
        notes += [text for line in self.lines if (text := _not_finite(line))]
        spec = {
            "title": self.title, "y_label": self.y_label, "log_y": self.log_y, "log_x": self.log_x, "zero": self.zero,
            "series": series,
            "marks": [
                {"x": _single(mark.x, self.x_label), "label": mark.label, "kind": mark.kind} for mark in self.marks
            ],
        }  # fmt: skip
        return _figure(self.title, notes, spec, data)

    def _series(self, line: Line, number: int) -> dict[str, Any]:
        y = np.asarray(line.y, dtype=np.float64)
        kept = thinned(y, self.points)
        axes = line.x if isinstance(line.x, Mapping) else {self.x_label: line.x}
        return {
            "name": line.name,
            "x": {name: _numbers(np.asarray(values, dtype=np.float64)[kept]) for name, values in axes.items()},
            "y": _numbers(y[kept]),
            "style": line.style,
            "colour": (number if line.colour is None else line.colour) % COLOURS,
            "thinned": len(kept) < len(y),
        }


@dataclass(frozen=True)
class Histogram:
    """Counts between edges, with marked thresholds. edges: one more than counts, rising."""

    title: str
    edges: ArrayLike
    counts: Mapping[str, ArrayLike]
    """Name of a group (a source, kept and removed) -> its count between each two edges."""
    x_label: str
    y_label: str = "documents"
    thresholds: Sequence[Mark] = ()
    log_x: bool = False
    log_y: bool = False
    note: str = ""

    def html(self, data: list[dict[str, Any]]) -> str:
        edges = np.asarray(self.edges, dtype=np.float64)
        series = []
        for number, (name, counts) in enumerate(self.counts.items()):
            values = np.asarray(counts, dtype=np.float64)
            if len(edges) != len(values) + 1:
                raise ValueError(f"{self.title}: {len(edges)} edges for {len(values)} counts of {name}")
            series.append(
                {
                    "name": name, "x": {self.x_label: _numbers(edges)}, "y": _numbers(np.append(values, values[-1:])),
                    "style": "steps", "colour": number % COLOURS, "thinned": False,
                }
            )  # fmt: skip
        spec = {
            "title": self.title, "y_label": self.y_label, "log_y": self.log_y, "log_x": self.log_x, "zero": True,
            "series": series,
            "marks": [
                {"x": _single(mark.x, self.x_label), "label": mark.label, "kind": mark.kind, "named": True}
                for mark in self.thresholds
            ],
        }  # fmt: skip
        return _figure(self.title, [self.note] if self.note else [], spec, data)


def thinned(y: NDArray[np.float64], points: int) -> NDArray[np.intp]:
    """Rising positions in y that show it: all if they are at most `points`, else of each stretch the smallest, the
    largest and the first that is not finite, and the ends."""
    count = len(y)
    if count <= points:
        return np.arange(count)
    length = math.ceil(count / max(1, (points - 2) // 2))
    rest = -count % length
    finite = np.isfinite(y)
    low = np.pad(np.where(finite, y, np.inf), (0, rest), constant_values=np.inf).reshape(-1, length)
    high = np.pad(np.where(finite, y, -np.inf), (0, rest), constant_values=-np.inf).reshape(-1, length)
    gaps = np.pad(~finite, (0, rest)).reshape(-1, length)
    begins = np.arange(0, count, length)
    found = [
        begins + low.argmin(axis=1),
        begins + high.argmax(axis=1),
        (begins + gaps.argmax(axis=1))[gaps.any(axis=1)],
    ]
    return np.unique(np.concatenate([*found, [0, count - 1]]))


def _single(x: float | Mapping[str, float], label: str) -> dict[str, float]:
    return {name: float(value) for name, value in (x if isinstance(x, Mapping) else {label: x}).items()}


def _numbers(values: NDArray[np.float64]) -> list[float | int | None]:
    """As JSON: whole numbers as such, others with seven digits, None for what is not finite."""
    found: list[float | int | None] = []
    for value in values.tolist():
        if not math.isfinite(value):
            found.append(None)
        else:
            found.append(int(value) if value == int(value) else float(f"{value:.7g}"))
    return found


def _not_finite(line: Line) -> str:
    y = np.asarray(line.y, dtype=np.float64)
    wrong = np.flatnonzero(np.isinf(y))
    return f"{line.name}: {len(wrong):,} values are infinite, and not drawn" if len(wrong) else ""


def _figure(title: str, notes: Sequence[str], spec: dict[str, Any], data: list[dict[str, Any]]) -> str:
    data.append(spec)
    below = "".join(f"<p class=note>{escape(note)}</p>" for note in notes)
    return (
        f'<figure class="plot"><figcaption>{escape(title)}</figcaption>'
        f'<div class="canvas" data-plot="{len(data) - 1}"></div>{below}</figure>'
    )
