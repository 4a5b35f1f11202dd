"""What a run folder says, read once: for the report (run_page.py) and the table of runs (run_table.py).

Invariants: nothing is written and nothing is locked; a run may be training. What cannot be read is a line of
`problems`, which the page shows, and costs no other part. No torch.
Costs: metrics.csv and one look at steps.jsonl; for each checkpoint two small files. The states are not read.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import yaml

from lit_gpt.checkpoint.record import NAME, Checkpoint, DamagedCheckpoint, described
from lit_gpt.cli import BadInput
from lit_gpt.datapoints.attempts import Attempt, Mark, is_in_lineage, read_attempts
from lit_gpt.datapoints.line_log import whole_lines
from lit_gpt.datapoints.log import FOLDER, VERIFIED
from lit_gpt.datapoints.run_record import RunRecord, StepRecord
from lit_gpt.files import read_json
from lit_gpt.report import metrics
from lit_gpt.report.life import Beat, Life, life_of, read_beats
from lit_gpt.report.metrics import Metrics
from lit_gpt.values import near_path

Result = TypeVar("Result")
MARKS = ("settings.yaml", "metrics.csv", FOLDER)
"""What a run folder has, one of them at least."""
RECORD = "training_record"
"""Folder in an exported model: what of its run goes with it."""
BESIDE = ("report.html", "watchdog", "environment.json", "resolved.json", "plan.json", "samples.jsonl", "tensorboard")
"""What else a run folder may have before these."""
_STATE = re.compile(r"xxh3 `([0-9a-f]{16})`")


class Saved(NamedTuple):
    """A checkpoint on disk, as it describes itself."""

    checkpoint: Checkpoint | None
    """None if it is damaged."""
    name: str
    bytes: int
    state_xxh3: str
    left: bool
    """It is of a branch that the run has left."""
    exports: tuple[str, ...]
    """Folders in <run folder>/huggingface that hold this very state."""
    damage: str = ""

    @property
    def step(self) -> int:
        return int(self.name.split("-")[1])


class Deviation(NamedTuple):
    """A departure from plain training: skipped, rollback, left_out."""

    attempt: int
    """That wrote it."""
    fields: Mapping[str, Any]

    @property
    def kind(self) -> str:
        return str(self.fields["deviation"])

    @property
    def step(self) -> int:
        return int(self.fields["step"])


@dataclass
class RunView:
    """A run folder's content."""

    folder: Path
    metrics: Metrics
    life: Life
    settings: dict[str, Any] = field(default_factory=dict)
    """As asked for."""
    resolved: dict[str, Any] = field(default_factory=dict)
    """What `auto` and unset values stood for, and max_steps."""
    environment: dict[str, Any] = field(default_factory=dict)
    plan: dict[str, Any] = field(default_factory=dict)
    """What the run was expected to need."""
    attempts: list[Attempt] = field(default_factory=list)
    last_steps: list[StepRecord | None] = field(default_factory=list)
    """The last step that each attempt did."""
    newest: StepRecord | None = None
    """The newest step of the run's history."""
    deviations: list[Deviation] = field(default_factory=list)
    saved: list[Saved] = field(default_factory=list)
    """By step."""
    beats: list[Beat] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    verified: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    shown_as: str = ""
    """Instead of the folder's name, where another run's folder has the same."""

    @property
    def name(self) -> str:
        return self.shown_as or self.folder.resolve().name

    @property
    def step(self) -> int:
        """The newest step, as the datapoint log says or else metrics.csv."""
        return self.newest.step if self.newest else int(self.metrics.last("step") or 0)

    @property
    def max_steps(self) -> int | None:
        found = self.resolved.get("max_steps", self.settings.get("max_steps"))
        return found if isinstance(found, int) else None

    @property
    def checkpoints(self) -> list[Checkpoint]:
        """The whole ones of the run's history, by step."""
        return [saved.checkpoint for saved in self.saved if saved.checkpoint is not None and not saved.left]

    @property
    def world_size(self) -> int:
        found = self.attempts[-1].details.get("world_size") if self.attempts else None
        return found if isinstance(found, int) else 1

    @property
    def chosen(self) -> dict[str, Any]:
        """The settings as they were used."""
        return {**self.settings, **{k: v for k, v in self.resolved.items() if k != "packages"}}


def read_runs(folders: Sequence[Path]) -> list[RunView]:
    """Read several runs; those with folders of the same name are named by as much of their paths as differs."""
    paths = [folder.resolve() for folder in folders]
    for folder, path in zip(folders, paths, strict=True):
        if paths.count(path) > 1:
            raise BadInput(f"{folder} is given twice; name each run once")
    views = [read_run(folder) for folder in folders]
    for view, path in zip(views, paths, strict=True):
        parts = 1
        while any(other.parts[-parts:] == path.parts[-parts:] for other in paths if other != path):
            parts += 1
        view.shown_as = str(Path(*path.parts[-parts:]))
    return views


def read_run(folder: Path) -> RunView:
    """Read a run folder, also an empty one, or one of an earlier version; BadInput if there is no folder."""
    if not folder.is_dir():
        raise BadInput(f"{folder}: no such folder{near_path(folder) or '; give that of a run (out/<model_name>)'}")
    if (folder / "MANIFEST.json").exists():
        raise BadInput(f"{folder} is a data set, a corpus or a checkpoint; give the folder of a run (out/<model_name>)")
    if (folder / RECORD).is_dir() and not any((folder / mark).exists() for mark in MARKS):
        raise BadInput(f"{folder} is an exported model; the record of its run is {folder / RECORD}")
    if _is_of_something_else(folder):
        raise BadInput(f"{folder} is no run folder; python scripts/runs.py {folder} lists the runs below it")
    view = RunView(folder, metrics.read(folder / "metrics.csv"), life_of([], 0, None, None, [], None))
    if view.metrics.damaged:
        view.problems.append(f"metrics.csv: {view.metrics.damaged:,} damaged lines are left out")
    part = _Parts(view.problems)
    view.settings = part.read(folder / "settings.yaml", _yaml)
    view.resolved = part.read(folder / "resolved.json", read_json)
    view.environment = part.read(folder / "environment.json", read_json)
    view.plan = part.read(folder / "plan.json", read_json)
    view.verified = part.read(folder / FOLDER / VERIFIED, read_json)
    view.attempts = part.found(lambda: read_attempts(folder / FOLDER), [])
    if view.attempts:
        part.found(lambda: _read_record(view), None)
    interval = view.settings.get("log_interval_steps")
    if not view.metrics.lines and view.step >= 2 * (interval if isinstance(interval, int) else 1):
        view.problems.append(f"metrics.csv: no line of it can be read, and the run is at step {view.step:,}")
    exports = _exports(folder)
    found = [(path, _saved(path, view.attempts, exports)) for path in sorted(folder.glob("iter-*-ckpt.pth"))]
    view.saved = [saved for path, saved in found if path.exists()]  # retention may have removed one meanwhile
    view.problems += [saved.damage for saved in view.saved if saved.damage]
    view.samples = part.found(lambda: _samples(folder / "samples.jsonl"), [])
    view.beats = read_beats(folder / "watchdog", view.world_size)
    times = view.metrics.times[np.isfinite(view.metrics.times)]
    saved_at = view.saved[-1].step if view.saved and not view.saved[-1].damage else None
    view.life = life_of(
        view.beats, view.step, view.max_steps, saved_at, times[-2:].tolist(), view.settings.get("watchdog_floor_s")
    )
    return view


def _is_of_something_else(folder: Path) -> bool:
    """Whether a folder has files, and none of a run. A run that has just begun may have no file yet."""
    if any((folder / mark).exists() for mark in MARKS) or any(folder.glob("iter-*-ckpt.pth")):
        return False
    return any(path.name not in BESIDE and not path.name.startswith(".") for path in folder.iterdir())


def read_mappings(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """settings.yaml and resolved.json of a run folder; empty where there is none, or a damaged one."""
    part = _Parts([])
    return part.read(folder / "settings.yaml", _yaml), part.read(folder / "resolved.json", read_json)


class _Parts:
    """Reads parts of a run; one that cannot be read is a problem, and empty."""

    def __init__(self, problems: list[str]) -> None:
        self._problems = problems

    def read(self, path: Path, read: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
        return self.found(lambda: read(path), {}) if path.is_file() else {}

    def found(self, read: Callable[[], Result], otherwise: Result) -> Result:
        try:
            return read()
        except (BadInput, OSError) as error:
            self._problems.append(" ".join(str(error).split()))
            return otherwise


def _yaml(path: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadInput(f"{path} is no YAML: {error}") from None
    if not isinstance(found, dict):
        raise BadInput(f"{path} holds no settings")
    return {str(name): value for name, value in found.items()}


def _read_record(view: RunView) -> None:
    with RunRecord(view.folder / FOLDER) as record:
        view.last_steps = [record.last_of(number) for number in range(len(record.attempts))]
        view.newest = record.last()
        view.deviations = [Deviation(number, fields) for number, fields in record.all_deviations()]
        view.attempts = record.attempts


def _saved(path: Path, attempts: list[Attempt], exports: Mapping[str, list[str]]) -> Saved:
    try:
        if not NAME.fullmatch(path.name):
            raise DamagedCheckpoint(f"{path.name}: no name of a checkpoint")
        found = described(path)
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        mark = found.facts.get("datapoint_log")
        left = bool(attempts and mark and not is_in_lineage(Mark(**mark), attempts))
        state = found.state_xxh3
    except (DamagedCheckpoint, OSError) as error:
        name = path.name if NAME.fullmatch(path.name) else "iter-00000000-ckpt.pth"
        return Saved(None, name, 0, "", False, (), " ".join(str(error).split()))
    return Saved(found, path.name, size, state, left, tuple(exports.get(state, ())))


def _exports(folder: Path) -> dict[str, list[str]]:
    """state_xxh3 -> the exported folders whose card names it."""
    found: dict[str, list[str]] = {}
    for card in sorted(folder.glob("huggingface/*/README.md")):
        for state in _STATE.findall(card.read_text(encoding="utf-8", errors="replace")):
            found.setdefault(state, []).append(card.parent.name)
    return found


def _samples(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    found = []
    for line in whole_lines(path):
        try:
            sample = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(sample, dict) and isinstance(sample.get("step"), int):
            found.append(sample)
    return found


def number(value: object) -> float | None:
    """A finite number of a file, else None."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if is_number else None  # type: ignore[arg-type]
