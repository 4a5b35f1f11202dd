"""The run folder: where it is, whether it can be written, and the files that say what the run was.

settings.yaml holds the settings as they were asked for and nothing else: `--config settings.yaml` repeats the run.
resolved.json says what `auto` and None stood for there, environment.json with which code and packages. None reads the
environment's variables, where secrets live.
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
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from lit_gpt.cli import BadInput
from lit_gpt.files import publish, sweep, whole_lines

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
_CHECKOUT = Path(__file__).resolve().parents[2]


def create(path: Path) -> None:
    """Make the run folder, and refuse one that cannot be written. All ranks may do so at once."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise BadInput(
            f"the run folder {path} cannot be written: {error.strerror}. Choose another by --out_dir"
        ) from None


def write_settings(path: Path, settings: Mapping[str, Any], resolved: Mapping[str, Any]) -> None:
    """settings.yaml, resolved.json and environment.json; `resume` is left out: it says how a start began, not what
    the run is."""
    asked = {name: value for name, value in settings.items() if name != "resume"}
    sweep(path)
    publish(path / "settings.yaml", [yaml.safe_dump(asked, sort_keys=False).encode()])
    publish(path / RESOLVED, [json.dumps(resolved, indent=1).encode()])
    publish(path / "environment.json", [json.dumps(environment(), indent=1).encode()])


def read_metrics(path: Path, last_step: int | None = None) -> list[dict[str, str]]:
    """The lines of metrics.csv, up to `last_step` where it is given; none where there is no such file.

    The last line of a run that goes on, or was killed, may be cut short: it is left out.
    """
    if not path.is_file():
        return []
    return [row for row in csv.DictReader(whole_lines(path)) if last_step is None or int(row["step"]) <= last_step]


def environment() -> dict[str, Any]:
    """Code and package versions, for run files and checkpoints."""
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
    """The checkout's commit, marked when files differ from it; None outside a checkout or without git."""
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty"],
            cwd=_CHECKOUT, capture_output=True, text=True, check=True,
        ).stdout.strip()  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return None


def read_resolved(folder: Path) -> dict[str, Any] | None:
    """What a run's settings stood for; None where the folder is not that of a run that wrote it."""
    path = folder / RESOLVED
    return json.loads(path.read_text()) if path.is_file() else None


def log_changes(saved: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Name each setting that differs from those that a checkpoint was saved with."""
    for name, value in settings.items():
        if name != "resume" and name in saved and saved[name] != value:
            log.warning("--%s was %r when the checkpoint was saved, and is %r now", name, saved[name], value)
