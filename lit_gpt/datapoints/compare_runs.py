"""Compare the losses of runs that saw the same rows; what scripts/compare_runs.py prints and draws.

The first run is the reference. The datapoint logs show whether the rows are the same: on different rows, a difference
of losses says nothing about the change. No torch; a run may still be training.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from lit_gpt.cli import BadInput
from lit_gpt.datapoints.query import difference
from lit_gpt.datapoints.run_folder import read_metrics, read_resolved
from lit_gpt.datapoints.run_record import RunRecord
from lit_gpt.files import save_figure

PICTURES = (".png", ".svg", ".pdf")
_PLACES = ("out_dir", "resume")
"""Settings about where a run is or how it started, not what it is."""


class ComparedRun(NamedTuple):
    """What a run folder says of its run."""

    folder: Path
    settings: dict[str, Any]
    """As resolved, where resolved.json says so; else as asked for."""
    metrics: list[dict[str, str]]
    losses: dict[int, float]
    """Nats per target, for each logged step."""
    val_losses: dict[int, float]
    """The same on the validation split, for each step with a validation."""
    record: RunRecord


def open_run(folder: Path) -> ComparedRun:
    """Read a run folder; raises BadInput if it is none, or if no step is logged yet."""
    settings = folder / "settings.yaml"
    metrics = read_metrics(folder / "metrics.csv")
    if not settings.is_file() or not metrics:
        missing = "no line in metrics.csv" if settings.is_file() else "no settings.yaml"
        raise BadInput(f"{folder} holds {missing}: give the folder of a run that has logged a step")
    losses, val_losses = (
        {int(row["step"]): float(row[name]) for row in metrics if row[name]} for name in ("loss", "val_loss")
    )
    record = RunRecord(folder / "datapoints")
    resolved = {name: value for name, value in (read_resolved(folder) or {}).items() if name != "packages"}
    return ComparedRun(
        folder, {**yaml.safe_load(settings.read_text()), **resolved}, metrics, losses, val_losses, record
    )


def compare(runs: Sequence[ComparedRun]) -> Iterator[dict[str, Any]]:
    """One dictionary per run, the reference first; raises BadInput before the first one if a run saw other rows."""
    reference = runs[0]
    steps = [common_steps(reference, run) for run in runs]
    for run, compared in zip(runs, steps, strict=True):
        line: dict[str, Any] = {"run": str(run.folder), "steps": max(run.losses), "changed": changed(reference, run)}
        line |= {"loss": run.losses[max(run.losses)]}
        line |= {"val_loss": run.val_losses[max(run.val_losses)] if run.val_losses else None}
        if run is not reference:
            line |= differences(reference, run, compared)
        yield line | {"tokens_per_s": speed(run)}


def common_steps(reference: ComparedRun, run: ComparedRun) -> list[int]:
    """The steps that both logged, in order; raises BadInput if there are none, or if the two saw different rows."""
    found = difference(reference.record, run.record)
    if found.this is not None and found.other is not None:
        raise BadInput(
            f"{run.folder} saw other rows than {reference.folder} from step {found.step} on: only losses on the same "
            "rows can be compared (same data, --seed, --global_batch_size; scripts/datapoints.py diff tells more)"
        )
    steps = sorted(step for step in reference.losses.keys() & run.losses.keys() if step <= found.common_steps)
    if not steps:
        raise BadInput(f"{run.folder} and {reference.folder} logged no step in common (--log_interval_steps)")
    return steps


def changed(reference: ComparedRun, run: ComparedRun) -> dict[str, Any]:
    """The settings of a run that differ from the reference's."""
    return {
        name: value
        for name, value in run.settings.items()
        if name not in _PLACES and reference.settings.get(name) != value
    }


def differences(reference: ComparedRun, run: ComparedRun, steps: Sequence[int]) -> dict[str, Any]:
    """Of the losses' differences, run minus reference: the largest and its step, the mean size, and the mean (bias).

    NaN counts as the largest. Validation losses are compared at the last step that both validated.
    """
    by_step = {step: run.losses[step] - reference.losses[step] for step in steps}
    at_step = max(steps, key=lambda step: abs(by_step[step]) if by_step[step] == by_step[step] else float("inf"))
    line: dict[str, Any] = {
        "compared_steps": len(steps), "largest_difference": by_step[at_step], "at_step": at_step,
        "mean_difference": statistics.fmean(map(abs, by_step.values())), "bias": statistics.fmean(by_step.values()),
    }  # fmt: skip
    validated = run.val_losses.keys() & reference.val_losses.keys()
    if validated:
        step = max(validated)
        line |= {"val_difference": run.val_losses[step] - reference.val_losses[step], "val_at_step": step}
    return line


def speed(run: ComparedRun) -> int:
    """Tokens per second: the median of the second half of the lines, by when everything is compiled."""
    return round(statistics.median(float(row["tokens_per_s"]) for row in run.metrics[len(run.metrics) // 2 :]))


def draw(runs: Sequence[ComparedRun], path: Path) -> None:
    """Draw the losses by step and, below them, each run's difference from the reference, to `path`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 7), layout="constrained")
    above, below = figure.subplots(2, sharex=True)
    reference = runs[0]
    for number, run in enumerate(runs):
        color = f"C{number}"
        above.plot(list(run.losses), list(run.losses.values()), label=run.folder.name, color=color, linewidth=1)
        above.plot(list(run.val_losses), list(run.val_losses.values()), "o", color=color, markersize=4)
        steps = common_steps(reference, run)
        apart = [run.losses[step] - reference.losses[step] for step in steps]
        below.plot(steps, apart, color=color, linewidth=1)
    above.set(ylabel="loss, nats a target (dots: validation)")
    below.set(xlabel="step", ylabel=f"loss minus that of {reference.folder.name}")
    above.legend()
    for axes in (above, below):
        axes.grid(alpha=0.3)
    try:
        save_figure(figure, path, dpi=150)
    except OSError as error:
        raise BadInput(f"--plot {path} cannot be written: {error.strerror}") from None
