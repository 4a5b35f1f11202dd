"""Where a run's numbers and samples go: metrics.csv and samples.jsonl; TensorBoard and Weights & Biases on request.

A resumed run continues its files: a resume at step s drops the lines after s, which it will write again. Rank 0 only.
"""

from __future__ import annotations

import csv
import errno
import io
import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lit_gpt.datapoints.line_log import LineLog, or_alarm, whole_lines
from lit_gpt.datapoints.run_folder import PATHS, read_metrics
from lit_gpt.files import publish, sweep
from lit_gpt.train.board import Board
from lit_gpt.train.sampling import Sample
from lit_gpt.train.sent_steps import SentSteps
from lit_gpt.train.settings import TrackerSettings
from lit_gpt.train.wandb_run import WandbRun, has_room

log = logging.getLogger(__name__)

COLUMNS = (
    "step", "loss", "learning_rate", "grad_norm", "targets", "epoch", "tokens", "tokens_per_s", "step_s", "data_wait_s",
    "mfu", "mfu_palm", "memory_gib", "compiled_graphs", "skipped_steps", "val_loss", "val_perplexity",
    "val_bits_per_byte", "time", "attempt", "validate_s", "sample_s", "save_s",
    "compute_s", "slowest_compute_s", "slowest_rank", "longest_data_wait_s", "gpu_clock_mhz", "gpu_temperature_c",
    "gpu_power_w", "throttled_gpus", "gpu_energy_j", "host_energy_j", "joules_per_token",
)  # fmt: skip
"""step: updates done; loss: nats a target, mean of the step; targets: valid targets of the step; tokens: valid targets
of the run so far; skipped_steps: steps of the run so far whose update was skipped; time: when the line was written;
attempt: the start of the program that wrote it, as datapoints/run.json counts them; validate_s, sample_s, save_s: how
long training waited for each since the line before, in seconds; compute_s, slowest_compute_s: seconds a step in the
blocks' forward passes, median and most of the ranks, and slowest_rank whose that is; longest_data_wait_s: of a rank;
gpu_clock_mhz: lowest; gpu_temperature_c: highest; gpu_power_w: mean; throttled_gpus: how many are slowed by heat or a
fault; gpu_energy_j, host_energy_j: joules of all GPUs and hosts since the line before; joules_per_token: their sum, as
far as they are known, for each valid target. Lines of earlier versions have none of these."""


_GROUPS = {
    "train": ("loss", "learning_rate", "grad_norm", "targets", "epoch", "tokens", "skipped_steps"),
    "speed": (
        "tokens_per_s", "step_s", "data_wait_s", "mfu", "mfu_palm", "compiled_graphs", "validate_s", "sample_s",
        "save_s", "compute_s", "slowest_compute_s", "slowest_rank", "longest_data_wait_s",
    ),
}  # fmt: skip
"""TensorBoard's groups; val_ columns are in `val`, all others, which are of devices, in `device`."""


def tag(column: str) -> str:
    """A column's tag in TensorBoard: loss -> train/loss, val_loss -> val/loss."""
    if column.startswith("val_"):
        return f"val/{column.removeprefix('val_')}"
    group = next((name for name, columns in _GROUPS.items() if column in columns), "device")
    return f"{group}/{column}"


class Trackers:
    """The trackers of one run folder; `step` is the number of updates that are done."""

    def __init__(
        self,
        run_dir: Path,
        resume_step: int,
        settings: TrackerSettings,
        run_settings: Mapping[str, Any],
        attempt: int | None = None,
        *,
        branch: str = f"{0:016x}",
        goes_back: bool = False,
    ) -> None:
        """run_settings: all settings of the run, for both boards; resume_step: last step whose lines stay;
        attempt: this start's number in the datapoint log; branch, goes_back: see SentSteps.begin."""
        self._attempt = attempt
        self._run_dir, self._settings, self._run_settings, self._branch = run_dir, settings, run_settings, branch
        path = run_dir / "metrics.csv"
        lines = _lines_or_aside(path)
        kept = [row for row in lines if int(row["step"]) <= resume_step]
        sent = SentSteps.begin(  # before metrics.csv loses lines
            run_dir, resume_step, branch, goes_back=goes_back,
            project=settings.wandb_project if settings.wandb != "off" else None,
            last_line=max((int(row["step"]) for row in lines), default=0),
        )  # fmt: skip
        self._samples = run_dir / "samples.jsonl"
        for written in (path, self._samples):
            sweep(run_dir, written.name, alone=True)
            written.with_name(f"{written.name}.new").unlink(missing_ok=True)  # of an earlier version
        if path.exists() and path.read_bytes().count(b"\n") > len(lines) + 1:
            aside = _aside(path)
            log.warning("%s is damaged: it stays as %s", path, aside.name)
            or_alarm(aside, lambda: publish(aside, [path.read_bytes()]))
        further = dict.fromkeys(name for row in kept for name in row if name not in COLUMNS)
        self._columns = (*COLUMNS, *further)  # those of another version stay
        head = [dict(zip(self._columns, self._columns, strict=True)), *kept]
        or_alarm(path, lambda: publish(path, [self._csv_line(row).encode() for row in head]))
        if self._samples.exists():
            or_alarm(self._samples, lambda: _keep_samples(self._samples, resume_step))
        self._metrics = LineLog(path)
        self._samples_log: LineLog | None = None
        self._board = Board(run_dir / "tensorboard", resume_step + 1) if settings.tensorboard else None
        if self._board is not None:
            shown = {name: value for name, value in run_settings.items() if name not in PATHS}
            self._board.hyperparameters(shown, (tag("loss"), tag("val_loss")))
        asked = settings.wandb != "off" and sent is not None
        self._wandb_waits = asked and not has_room(run_dir)
        if self._wandb_waits:
            log.error("Weights & Biases: no room for its files in %s: it begins when there is room", run_dir)
        self._wandb = self._start_wandb(sent, kept) if sent is not None and asked and not self._wandb_waits else None

    def _start_wandb(self, sent: SentSteps, rows: Sequence[Mapping[str, str]]) -> WandbRun:
        """Start Weights & Biases, and send it the lines of metrics.csv that it was not sent."""
        settings = self._settings
        assert settings.wandb != "off"
        run = WandbRun(
            self._run_dir, settings.wandb, project=settings.wandb_project, name=settings.wandb_name,
            config=self._run_settings, sent=sent, timeout_s=settings.wandb_timeout_s,
        )  # fmt: skip
        for row in rows:
            run.log(int(row["step"]), _numbers(row))
        return run

    def log(self, values: Mapping[str, float | int | None]) -> None:
        """Write one line; missing or None columns stay empty. Flushed at once, so a killed run keeps its lines."""
        present = {name: value for name, value in values.items() if value is not None}
        written = {**present, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "attempt": self._attempt}
        in_csv = bool(self._metrics.append(self._csv_line(written)))
        step = int(values["step"] or 0)
        if self._board is not None:
            self._board.scalars(step, {tag(name): value for name, value in present.items() if name != "step"})
        if self._wandb is not None or self._wandb_waits:
            self._send(step, present, room=in_csv and has_room(self._run_dir))

    def _send(self, step: int, present: Mapping[str, float | int], *, room: bool) -> None:
        """Send a line to Weights & Biases; on a full disk it waits until there is room for all lines again."""
        if self._wandb is not None and not room:
            self._wandb.leave()
            self._wandb, self._wandb_waits = None, True
        elif self._wandb is not None:
            self._wandb.log(step, present)
        elif room:
            self._wandb_waits = False
            sent = SentSteps.begin(
                self._run_dir, step, self._branch, goes_back=False, last_line=step, project=self._settings.wandb_project
            )
            assert sent is not None
            log.warning("Weights & Biases: there is room again: run %s gets all lines of metrics.csv", sent.run_id)
            self._wandb = self._start_wandb(sent, read_metrics(self._run_dir / "metrics.csv"))

    def log_samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Write one line for each sample."""
        self._samples_log = self._samples_log or LineLog(self._samples)
        for sample in samples:
            self._samples_log.append(json.dumps({"step": step, **sample._asdict()}, ensure_ascii=False) + "\n")
        texts = "\n\n".join(f"**{sample.prompt}**{sample.text}" for sample in samples)
        if self._board is not None:
            self._board.text(step, "samples", texts)

    def _csv_line(self, row: Mapping[str, Any]) -> str:
        text = io.StringIO()
        csv.DictWriter(text, self._columns).writerow(row)
        return text.getvalue()

    def close(self) -> None:
        self._metrics.close()
        if self._samples_log is not None:
            self._samples_log.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.close()


def _aside(path: Path) -> Path:
    return path.with_name(f"{path.name}.damaged-{time.time_ns()}")


def _lines_or_aside(path: Path) -> list[dict[str, str]]:
    """The lines of metrics.csv; what cannot be read under its name (a bad block, a folder) is moved aside, whole."""
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        return read_metrics(path)
    except OSError as error:
        aside = _aside(path)
        log.warning("%s cannot be read (%s): it stays as %s", path, error.strerror, aside.name)
        or_alarm(aside, lambda: path.rename(aside))
        return []


def _numbers(row: Mapping[str, str]) -> dict[str, float | int]:
    """A line of metrics.csv as it was logged."""
    found: dict[str, float | int] = {}
    for name, text in row.items():
        if name in ("time", "attempt") or not text:
            continue
        try:
            found[name] = int(text) if text.lstrip("-").isdecimal() else float(text)
        except ValueError:  # a column of another version
            continue
    return found


def _keep_samples(path: Path, resume_step: int) -> None:
    """Drop the samples after `resume_step`, and a last line that a kill cut short."""
    publish(path, [line.encode() for line in whole_lines(path) if (step := _step(line)) and step <= resume_step])


def _step(line: str) -> int | None:
    try:
        step = json.loads(line)["step"]
    except (ValueError, LookupError, TypeError):
        return None
    return step if isinstance(step, int) else None
