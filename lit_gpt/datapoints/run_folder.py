"""The run folder: create it, and write and read the files that say what the run was.

settings.yaml holds the settings as asked for, so that `--config settings.yaml` repeats the run. resolved.json says what
`auto` and None stood for, environment.json which code and packages ran. No file holds environment variables, where
secrets live.
"""

from __future__ import annotations

import csv
import json
import logging
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from lit_gpt.cli import BadInput
from lit_gpt.datapoints.line_log import or_alarm, whole_lines
from lit_gpt.files import publish, read_json, sweep

log = logging.getLogger(__name__)

PACKAGES = (
    "torch",
    "lightning",
    "numpy",
    "pyarrow",
    "tokenizers",
    "triton",
    "flash-attn-3",
    "flash-attn-4",
    "quack-kernels",
    "torchao",
)
RESOLVED = "resolved.json"
PATHS = ("train_data_dir", "val_data_dir", "tokenizer_path", "cache_dir", "out_dir", "memory_checkpoint_dir")
"""The settings that are paths of a run."""
_OF_ONE_START = ("resume", "new_data", "allow_changed_data")
"""Settings that belong to one start, not to the run."""
_CHECKOUT = Path(__file__).resolve().parents[2]


def create(path: Path) -> None:
    """Make the run folder; BadInput if it cannot be written. All ranks may call this at once."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise BadInput(
            f"the run folder {path} cannot be written: {error.strerror}. Choose another by --out_dir"
        ) from None


def write_settings(path: Path, settings: Mapping[str, Any], resolved: Mapping[str, Any]) -> None:
    """Write settings.yaml, resolved.json and environment.json: those that run now. How an earlier attempt differed is
    in the datapoint log's run.json. `resume` and the like are left out: they belong to one start, not to the run."""
    asked = {name: value for name, value in settings.items() if name not in _OF_ONE_START}
    sweep(path)
    for name, text in (
        ("settings.yaml", yaml.safe_dump(asked, sort_keys=False)),
        (RESOLVED, json.dumps(resolved, indent=1)),
        ("environment.json", json.dumps(environment(), indent=1)),
    ):
        or_alarm(path / name, partial(publish, path / name, [text.encode()]))


def read_metrics(path: Path, last_step: int | None = None) -> list[dict[str, str]]:
    """The lines of metrics.csv, up to `last_step` if given; none where there is no such file.

    Each line is parsed by itself, so that a stray quote costs one. Left out, with a warning, are those that do not have
    the header's columns, or whose step is no number; and all of them below a header without `step`.
    """
    if not path.is_file():
        return []
    header, *lines = [_fields(line) for line in whole_lines(path)] or [[]]
    rows = [dict(zip(header, line, strict=True)) for line in lines if len(line) == len(header)]
    known = [row for row in rows if row.get("step", "").isdecimal()]
    if len(known) < len(lines):
        log.warning("%s: %d damaged lines of %d are left out", path, len(lines) - len(known), len(lines))
    return [row for row in known if last_step is None or int(row["step"]) <= last_step]


def _fields(line: str) -> list[str]:
    try:
        return next(csv.reader([line]), [])
    except csv.Error:
        return []


def environment() -> dict[str, Any]:
    """Commit, versions and command line, for environment.json and checkpoints."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "packages": versions,
        "command": sys.argv,
    }


def _git_commit() -> str | None:
    """The checkout's commit, "-dirty" if files differ from it; None outside a checkout or without git."""
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty"],
            cwd=_CHECKOUT, capture_output=True, text=True, check=True,
        ).stdout.strip()  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return None


def read_resolved(folder: Path) -> dict[str, Any] | None:
    """The content of resolved.json; None where the folder has none. Raises BadInput if it is damaged."""
    path = folder / RESOLVED
    if not path.exists():
        return None
    found = read_json(path)
    if not isinstance(found.get("packages", {}), dict):
        raise BadInput(f"{path}: packages is not a JSON object. Without the file the run is repeated, not compared")
    return found


def with_absolute_paths(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings, paths from the root (links as they are): they mean the same wherever settings.yaml is used."""
    found = dict(settings)
    for name in PATHS:
        value = found.get(name)
        if value is not None:
            found[name] = [_absolute(path) for path in value] if isinstance(value, list) else _absolute(value)
    return found


def _absolute(path: str) -> str:
    return str(Path(path).absolute())


def changed_settings(saved: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Each setting that differs from what a checkpoint was saved with: name -> [as saved, now]."""
    before = with_absolute_paths(saved)
    names = [name for name in settings if name in before and name not in _OF_ONE_START]
    return {name: [before[name], settings[name]] for name in names if before[name] != settings[name]}
