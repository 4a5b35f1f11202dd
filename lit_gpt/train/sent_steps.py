"""Which steps Weights & Biases was sent, over all starts of a run: the file wandb-id of the run folder.

    the run's id there
    the last step that was sent, rewritten in place before each line goes
    its branch: a hash of what determines the numbers of a step
    the project that it lies in

Files of earlier versions hold the id alone (sent is then what metrics.csv has), or no project (then it is the same).
Invariants: Weights & Biases shows what metrics.csv shows, and no step twice. A start before the last sent step that
computes the same numbers again (a resume after a crash) sends none of them; one that goes another way, or to another
project, begins a new run there, which is filled from the lines of metrics.csv that stay. So do starts with --wandb off,
for the next with it.
Costs: one write of 20 bytes a line.
"""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import xxhash

from lit_gpt.datapoints.line_log import or_alarm
from lit_gpt.files import open_own, publish
from lit_gpt.model.settings import ModelSettings
from lit_gpt.train.settings import LIMITS, OptimizerSettings, Settings, SpikeSettings

log = logging.getLogger(__name__)

ID_FILE = "wandb-id"
_FORM = re.compile(
    rb"(?P<id>[\w-]{1,64})\n?|"
    rb"(?P<run>[\w-]{1,64})\n(?P<step>\d{20})\n(?P<branch>[0-9a-f]{16})\n(?:(?P<project>[^\n]+)\n)?"
)
_LOGGED = ("log_interval_steps", "eval_interval_steps", "eval_max_rows")


class SentSteps:
    """The run at Weights & Biases that the present start goes on with."""

    def __init__(self, path: Path, run_id: str, step: int, branch: str | None, project: str | None) -> None:
        self.run_id, self.step, self.branch, self.project = run_id, step, branch, project
        self._path, self._broken = path, False

    @classmethod
    def begin(
        cls, run_dir: Path, resume_step: int, branch: str, *, goes_back: bool, last_line: int, project: str | None
    ) -> SentSteps | None:
        """What was sent, for a start that goes on after `resume_step`; None if nothing ever was and nothing shall be.

        branch: its branch_hash; goes_back: a user said to leave later steps; last_line: of metrics.csv, as found;
        project: at Weights & Biases, None where it is off.
        """
        found = cls._read(run_dir / ID_FILE, last_line)
        if found is None and project is None:
            return None
        reason = None
        if found is not None and project is not None and found.project not in (None, project):
            reason = f"the project is {project} now, no longer {found.project}"
        elif found is not None and found.step > resume_step and (goes_back or found.branch not in (None, branch)):
            reason = f"this start goes another way after step {resume_step}"
        if found is None or reason is not None:
            left, found = found, cls(run_dir / ID_FILE, secrets.token_hex(4), 0, branch, project)
            if left is not None:
                log.warning(
                    "Weights & Biases: run %s was sent steps up to %d, and %s: run %s takes its place, filled from "
                    "metrics.csv",
                    left.run_id, left.step, reason, found.run_id,
                )  # fmt: skip
        where = project or found.project
        text = f"{found.run_id}\n{found.step:020d}\n{branch}\n" + (f"{where}\n" if where else "")
        or_alarm(found._path, lambda: publish(found._path, [text.encode()]))
        return found

    @classmethod
    def _read(cls, path: Path, last_line: int) -> SentSteps | None:
        if not path.exists():
            return None
        match = _FORM.fullmatch(path.read_bytes())
        if match is None:
            log.warning("%s is damaged: Weights & Biases gets a new run, filled from metrics.csv", path)
            return None
        if match["id"]:
            return cls(path, match["id"].decode(), last_line, None, None)
        project = match["project"].decode(errors="replace") if match["project"] else None
        return cls(path, match["run"].decode(), int(match["step"]), match["branch"].decode(), project)

    def note(self, step: int) -> None:
        """`step` is being sent."""
        self.step = step
        if self._broken:
            return
        self._broken = not or_alarm(self._path, self._rewrite)

    def forget(self) -> None:
        """Let the next start begin a new run, filled from metrics.csv."""
        or_alarm(self._path, lambda: self._path.unlink(missing_ok=True))
        self._broken = True

    def _rewrite(self) -> None:
        with os.fdopen(open_own(self._path, os.O_RDWR), "r+b", buffering=0) as file:
            file.seek(len(self.run_id) + 1)
            file.write(b"%020d" % self.step)


def branch_hash(settings: Settings, facts: Mapping[str, Any]) -> str:
    """A hash of what determines the numbers of a run's lines: settings, and facts such as those of its data.

    Where and how fast they are computed (processes, micro-batch, folders) is not part of it.
    """
    slices = (OptimizerSettings, SpikeSettings, ModelSettings)
    names = {field.name for part in slices for field in fields(part)} - set(LIMITS)
    values = {name: getattr(settings, name) for name in (*names, *_LOGGED)}
    return xxhash.xxh3_64_hexdigest(json.dumps([values, facts], sort_keys=True).encode())
