"""The report of one run, or of several beside each other.

Invariant: every number is from a file of the run folder; what the files do not hold is left out, not guessed. Plots
have a choice of axes: steps, tokens, and hours since the run's first start, stops included.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from lit_gpt.report.blocks import Block, Cell, Details, Group, Headline, Kind, Sample, Shares, Table, Text
from lit_gpt.report.goodput import TRAINING, goodput, started_s
from lit_gpt.report.life import State, time_left
from lit_gpt.report.metrics import Numbers
from lit_gpt.report.numbers import about, duration, moment, short, size
from lit_gpt.report.page import Page
from lit_gpt.report.plots import Line, Mark, Plot
from lit_gpt.report.run_data import data_blocks
from lit_gpt.report.run_events import Event, events, marked
from lit_gpt.report.run_settings import settings_blocks
from lit_gpt.report.run_table import model_of
from lit_gpt.report.run_view import RunView, number, read_runs

KINDS: dict[State, Kind] = {
    "empty": "plain", "running": "good", "finished": "good", "stopped": "plain", "waiting": "warning",
    "gave up": "bad", "failed": "bad", "dead": "bad",
}  # fmt: skip
POINTS = 2000
"""Points of a line; of several runs they share some of them, so that the page stays small."""
MARKS = 200
"""Most events that a plot marks; the table below the losses counts all."""
SHOWN_EVENTS, SHOWN_SAMPLES, SHOWN_RANKS = 12, 6, 16
Which: TypeAlias = NDArray[np.bool_]
_KNOWN = {
    "step", "loss", "learning_rate", "grad_norm", "targets", "epoch", "tokens", "tokens_per_s", "step_s", "data_wait_s",
    "mfu", "mfu_palm", "memory_gib", "compiled_graphs", "skipped_steps", "val_loss", "val_perplexity",
    "val_bits_per_byte", "time", "attempt", "validate_s", "sample_s", "save_s",
}  # fmt: skip
"""Columns of metrics.csv that a section shows; each other one gets a plot of its own."""


def run_page(views: Sequence[RunView], *, live_s: float = 0) -> Page:
    """The page of the runs in `views`; live_s: as for Page."""
    title = views[0].name if len(views) == 1 else f"{len(views)} runs: {', '.join(view.name for view in views)}"
    written = moment(time.time())
    page = Page(title, f"{', '.join(str(view.folder) for view in views)} · written {written}", live_s=live_s)
    if len(views) == 1:
        page.add("Overview", Headline(overview(views[0])))
    else:
        page.add("Overview", _side_by_side(views))
    plots = _Plots(views)
    page.add("Losses", *plots.losses(), *_event_tables(views))
    page.add("Validation", *plots.validation())
    page.add("Optimizer", *plots.optimizer())
    page.add("Speed", *plots.speed(), *plots.time())
    page.add("Further columns of metrics.csv", *plots.further())
    page.add("Ranks", *_ranks(views))
    page.add("Checkpoints", *_each(views, _checkpoints))
    page.add("Data", *_each(views, data_blocks))
    page.add("Samples", *_each(views, _samples))
    page.add("Plan against reality", *_each(views, _plan))
    page.add("Settings", *settings_blocks(views))
    page.add("What could not be read", *(Text(problem, "bad") for view in views for problem in view.problems))
    return page


def overview(view: RunView) -> dict[str, object]:
    """Name -> value of what says most about a run."""
    metrics, life = view.metrics, view.life
    of = f" / {view.max_steps:,}" if view.max_steps else ""
    share = f"{view.step / view.max_steps:.1%}" if view.max_steps else ""
    found: dict[str, object] = {
        "state": Cell(life.state, KINDS[life.state], life.said), "step": Cell(f"{view.step:,}{of}", title=share)
    }  # fmt: skip
    if (model := model_of(view.settings, view.resolved)) != "?":
        found = {"model": Cell(model), **found}
    if life.state not in ("finished", "empty"):
        found["time left"] = _time_left(view)
    tokens = metrics.last("tokens")
    if tokens is not None:
        epoch = metrics.last("epoch")
        in_epoch = "" if epoch is None else f", epoch {epoch + 1:.0f}"
        found["tokens"] = Cell(short(tokens), title=f"{tokens:,.0f}{in_epoch}")
    for name, title, form in (
        ("loss", "loss", "{:.4f}"), ("val_loss", "validation loss", "{:.4f}"),
        ("val_bits_per_byte", "bits a byte", "{:.4f}"), ("tokens_per_s", "tokens a second", "{:,.0f}"),
    ):  # fmt: skip
        if (value := metrics.last(name)) is not None:
            at = metrics.of("step")[np.isfinite(metrics.of(name))][-1]
            found[title] = Cell(form.format(value), title=f"at step {at:,.0f}")
    if (mfu := metrics.last("mfu")) is not None:
        palm = metrics.last("mfu_palm")
        found["MFU"] = Cell(f"{mfu:.1%}", title="" if palm is None else f"{palm:.1%} with the embedding (PaLM)")
    if parts := goodput(view):
        whole = sum(parts.values())
        said = f"of {about(whole)} since the first start"
        found["goodput"] = Cell(f"{parts[TRAINING] / whole:.1%}", title=said)
    if view.attempts:
        found["starts"] = Cell(len(view.attempts), title="rollbacks included")
    return found


def _time_left(view: RunView) -> Cell:
    left = time_left(view.metrics, view.max_steps, started_s(view))
    if left is None:
        return Cell("?", title="too early to say")
    said = [] if left.low_s is None or left.high_s is None else [f"{duration(left.low_s)} to {duration(left.high_s)}"]
    if left.with_stops_s is not None:
        said.append(f"{duration(left.with_stops_s)} with stops as before")
    if view.life.state != "running":
        said.append("once it runs again")
    return Cell(duration(left.likely_s), title="; ".join(said))


def _side_by_side(views: Sequence[RunView]) -> Table:
    found = [overview(view) for view in views]
    names = list(dict.fromkeys(name for values in found for name in values))
    return Table(
        ("run", *names), [[view.name, *map(values.get, names)] for view, values in zip(views, found, strict=True)]
    )


def _each(views: Sequence[RunView], blocks: Callable[[RunView], Sequence[Block]]) -> Iterator[Block]:
    """The blocks of each run; of several, each folded below its name."""
    for view in views:
        found = blocks(view)
        if len(views) == 1:
            yield from found
        elif found:
            yield Details(view.name, Group(found))


class _Plots:
    """The plots of some runs."""

    def __init__(self, views: Sequence[RunView]) -> None:
        self._views = views
        self._points = max(300, POINTS // len(views))
        found = [(view, events(view)) for view in views]
        self._marks = [mark for view, all_ in found for mark in self._marks_of(view, marked(all_, MARKS // len(views)))]
        happened = sum(len(all_) for _, all_ in found)
        self._note = f"{len(self._marks)} of {happened:,} events are marked" if len(self._marks) < happened else ""

    def _axes(self, view: RunView) -> dict[str, Numbers]:
        metrics = view.metrics
        axes = {"step": metrics.of("step")}
        if metrics.has("tokens"):
            axes["tokens"] = metrics.of("tokens")
        began = started_s(view)
        if began is not None and np.isfinite(metrics.times).any():
            axes["hours"] = (metrics.times - began) / 3600
        return axes

    def _marks_of(self, view: RunView, chosen: Sequence[Event]) -> Iterator[Mark]:
        axes, steps = self._axes(view), view.metrics.of("step")
        prefix = f"{view.name}: " if len(self._views) > 1 else ""
        for event in chosen:
            if len(steps):
                x = {name: float(np.interp(event.step, steps, values)) for name, values in axes.items()}
                yield Mark(x, f"{prefix}{event.what}, {event.said}", event.kind)

    def _lines(self, name: str, title: str = "", **options: object) -> list[Line]:
        """A column of each run, of the lines that have it."""
        found = []
        for at, view in enumerate(self._views):
            if not view.metrics.has(name):
                continue
            values = view.metrics.of(name)
            filled = self._filled(view, name)
            label = " ".join(filter(None, [view.name if len(self._views) > 1 else "", title or name]))
            colour = {"colour": at} if len(self._views) > 1 else {}
            axes = {axis: numbers[filled] for axis, numbers in self._axes(view).items()}
            found.append(Line(label, axes, values[filled], **{**colour, **options}))  # type: ignore[arg-type]
        return found

    def _filled(self, view: RunView, name: str) -> Which:
        """Which lines have a value; all of them for a column of every line, where a NaN is a gap."""
        finite = np.isfinite(view.metrics.of(name))
        return finite if name.startswith("val_") or finite.mean() < 0.5 else np.full(len(finite), True)

    def _plot(self, title: str, lines: Sequence[Line], **options: object) -> list[Block]:
        if not lines:
            return []
        fixed = {"marks": self._marks, "points": self._points, "note": self._note}
        return [Plot(title, lines, **{**fixed, **options})]  # type: ignore[arg-type]

    def losses(self) -> list[Block]:
        train = self._lines("loss", "training")
        validation = self._lines("val_loss", "validation", style="points")
        if len(self._views) == 1:
            return self._plot("loss, nats a target", [*train, *validation])
        return [*self._plot("training loss, nats a target", train), *self._plot("validation loss", validation)]

    def validation(self) -> list[Block]:
        return [
            *self._plot("validation, bits a byte", self._lines("val_bits_per_byte", "validation", style="points")),
            *self._plot(
                "validation, perplexity", self._lines("val_perplexity", "validation", style="points"), log_y=True
            ),
        ]

    def optimizer(self) -> list[Block]:
        return [
            *self._plot("learning rate", self._lines("learning_rate", "learning rate"), zero=True),
            *self._plot("gradient norm, before clipping", self._lines("grad_norm", "gradient norm"), log_y=True),
        ]

    def speed(self) -> list[Block]:
        mfu = [*self._lines("mfu", "MFU"), *self._lines("mfu_palm", "MFU by PaLM's rule", style="dashed")]
        waits = [*self._lines("step_s", "a step"), *self._lines("data_wait_s", "of it waiting for data", style="faint")]
        return [
            *self._plot("tokens a second, all ranks", self._lines("tokens_per_s", "tokens a second"), zero=True),
            *self._plot("model FLOPs utilisation", mfu, zero=True),
            *self._plot("seconds a step", waits, zero=True),
            *self._plot("peak memory of rank 0, GiB", self._memory(), zero=True),
        ]

    def _memory(self) -> list[Line]:
        on_gpus = any((view.metrics.last("memory_gib") or 0) > 0 for view in self._views)
        return self._lines("memory_gib", "peak memory") if on_gpus else []

    def time(self) -> Iterator[Block]:
        for view in self._views:
            if parts := goodput(view):
                name = f"{view.name}: " if len(self._views) > 1 else ""
                title = f"{name}where {about(sum(parts.values()))} of wall time went"
                yield Shares(title, parts, shown={part: about(seconds) for part, seconds in parts.items()})

    def further(self) -> list[Block]:
        names = dict.fromkeys(name for view in self._views for name in view.metrics.columns if name not in _KNOWN)
        return [block for name in names for block in self._plot(name, self._lines(name))]


def _event_tables(views: Sequence[RunView]) -> Iterator[Block]:
    for view in views:
        found = events(view)
        if not found:
            continue
        name = f"{view.name}: " if len(views) > 1 else ""
        table = _event_table(found)
        counts = _counts(found)
        yield table if len(found) <= SHOWN_EVENTS and len(views) == 1 else Details(f"{name}{counts}", table)


def _counts(found: Sequence[Event]) -> str:
    names = list(dict.fromkeys(event.what for event in found))
    return ", ".join(f"{name}: {sum(event.what == name for event in found):,}" for name in names)


def _event_table(found: Sequence[Event]) -> Table:
    shown = found if len(found) <= 500 else [*found[:250], *found[-250:]]
    caption = "" if len(shown) == len(found) else f"the first and last 250 of {len(found):,}"
    rows = [(event.attempt, event.step, Cell(event.what, event.kind), event.said) for event in shown]
    return Table(("start", "step", "what", "how"), rows, caption)


def _ranks(views: Sequence[RunView]) -> Iterator[Block]:
    for view in views:
        beats = sorted(view.beats, key=lambda beat: beat.time)  # the longest silent first
        rows = [(beat.rank_name, beat.step, beat.place, moment(beat.time)) for beat in beats[:SHOWN_RANKS]]
        caption = f"{view.name}: the {len(rows)} of {len(beats)} heartbeats that are the oldest" if rows else ""
        if rows:
            yield Table(("rank", "step", "place", "last heartbeat"), rows, caption)


def _checkpoints(view: RunView) -> list[Block]:
    rows: list[Sequence[object]] = []
    for saved in view.saved:
        if saved.checkpoint is None:
            rows.append((saved.name, None, None, None, Cell("damaged", "bad", saved.damage), None, None))
            continue
        fields = saved.checkpoint.facts
        state = Cell("left behind", "warning", "of a branch that the run has left") if saved.left else "in the history"
        rows.append(
            (
                Cell(saved.name, code=True), number(fields.get("tokens")) and int(fields["tokens"]), size(saved.bytes),
                fields.get("environment", {}).get("time"), state, Cell(saved.state_xxh3, code=True),
                ", ".join(saved.exports) or None,
            )
        )  # fmt: skip
    if not rows:
        return []
    note = "Sizes agree with each manifest; the hash is that of the manifest. Loading a checkpoint compares every file."
    return [Table(("checkpoint", "tokens", "size", "saved", "branch", "state", "exported to huggingface/"), rows, note)]


def _samples(view: RunView) -> list[Block]:
    steps = sorted({sample["step"] for sample in view.samples})
    if not steps:
        return []
    chosen = {steps[at] for at in np.linspace(0, len(steps) - 1, SHOWN_SAMPLES).round().astype(int)}
    return [
        Sample(f"step {sample['step']:,}", str(sample.get("text", "")), str(sample.get("prompt", "")))
        for sample in view.samples
        if sample["step"] in chosen
    ]


def _plan(view: RunView) -> list[Block]:
    plan, metrics, rows = view.plan, view.metrics, []
    peak = metrics.of("memory_gib")
    planned = number(plan.get("memory_gib"))
    if planned is not None and np.nanmax(peak, initial=0.0) > 0:
        rows.append(("memory of a GPU, GiB", planned, float(np.nanmax(peak))))
    rate = number(plan.get("tokens_per_s"))
    if rate is not None and metrics.has("tokens_per_s"):
        half = metrics.of("tokens_per_s")[metrics.lines // 2 :]
        rows.append(("tokens a second, all ranks", rate, float(np.nanmedian(half))))
    planned_bytes = number(plan.get("checkpoint_bytes"))
    whole = [saved.bytes for saved in view.saved if saved.checkpoint is not None]
    if planned_bytes is not None and whole:
        rows.append(("a checkpoint, GiB", planned_bytes / 2**30, whole[-1] / 2**30))
    tokens = number(plan.get("tokens"))
    if tokens is not None and metrics.has("tokens"):
        rows.append(("tokens, padding included in the plan", int(tokens), int(metrics.last("tokens") or 0)))
    table = [(name, expected, found, f"{found / expected:.1%}" if expected else None) for name, expected, found in rows]
    return [Table(("", "planned", "so far", "share"), table)] if table else []


def write_report(folders: Sequence[Path], output: Path, *, live_s: float = 0) -> int:
    """Write the report of the runs in `folders`; returns its size in bytes. BadInput for a folder that is none."""
    return run_page(read_runs(folders), live_s=live_s).write(output)
