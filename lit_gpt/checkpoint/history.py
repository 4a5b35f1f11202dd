"""The checkpoints of a run folder as branches: which of them the run has come through, which is resumed, which stay.

A run that goes back, by --resume PATH to an older step or by a rollback, leaves a branch behind: checkpoints of steps
that are no part of it any more. The datapoint log knows: each start of a run is an attempt that goes on from a place in
an earlier one, and each checkpoint holds its own place. The run's history is the newest attempt and its ancestors; in a
folder without a log every checkpoint is part of it.

Invariants: --resume auto and rollbacks take checkpoints of the history alone, so the branch that was trained last goes
on; no other is taken silently, and none stands in for one that is missing. What was left behind stays until the
history has passed its step, and goes with a line in the log. A damaged checkpoint is never counted and never removed.
Costs: a run.json is read for each checkpoint; verifying is checkpoint.py's.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lit_gpt.checkpoint.checkpoint import (
    RUN,
    Checkpoint,
    DamagedCheckpoint,
    checkpoint_name,
    is_whole,
    names,
    newest_first,
    remove,
    verified,
)
from lit_gpt.cli import BadInput
from lit_gpt.datapoints.log import FOLDER, Mark, is_in_lineage, lineage, read_attempts

log = logging.getLogger(__name__)


def find(resume: str, run_dir: Path) -> Checkpoint | None:
    """The checkpoint that --resume names: a folder or a file in it; "auto": the newest whole one of the run's history,
    or None where nothing was trained yet.

    Raises BadInput if a named one is missing or damaged; damaged ones that "auto" passes over are warned about.
    """
    if resume == "auto":
        return _newest(run_dir)
    path = Path(resume)
    path = path.parent if path.is_file() else path
    if not path.is_dir():
        raise BadInput(f"--resume {resume}: no such checkpoint. In {run_dir}: {names(run_dir)}")
    try:
        return verified(path)
    except DamagedCheckpoint as error:
        raise BadInput(f"--resume {resume}: {error}. In {run_dir}: {names(run_dir)}") from None


def _newest(run_dir: Path) -> Checkpoint | None:
    """The newest whole one of the history, or the one of elsewhere with which the history began."""
    found = next(whole_newest_first(run_dir), None)
    if found is not None:
        return found
    attempts = lineage(read_attempts(run_dir / FOLDER))
    origin = attempts[-1].details.get("resumed_from") if attempts else None
    if origin is not None:
        try:
            return verified(Path(origin))
        except DamagedCheckpoint as error:
            raise BadInput(f"--resume auto: {run_dir} has no whole checkpoint, and it began with {error}") from None
    if newest_first(run_dir):
        raise BadInput(
            f"--resume auto: no checkpoint in {run_dir} is whole and of what was trained last ({names(run_dir)}): "
            "choose one by --resume PATH, or another --out_dir"
        )
    return None


def whole_newest_first(run_dir: Path) -> Iterator[Checkpoint]:
    """The checkpoints of the history that verify, each read when it is asked for; damaged ones are warned about."""
    others = left_behind(run_dir)
    for path in newest_first(run_dir):
        try:
            if path not in others:
                yield verified(path)
        except DamagedCheckpoint as error:
            log.warning("passing over %s: %s", path, error)


def left_behind(run_dir: Path) -> list[Path]:
    """The checkpoints of other branches, newest first; none that is too damaged to tell."""
    attempts = read_attempts(run_dir / FOLDER)
    if not attempts:
        return []
    from_nothing = lineage(attempts)[-1].parent is None
    found = []
    for path in newest_first(run_dir):
        facts = _facts(path)
        if facts is None:
            continue
        mark = facts.get("datapoint_log")  # an imported model has none: only a run can have begun with it
        if not (is_in_lineage(Mark(**mark), attempts) if mark else from_nothing):
            found.append(path)
    return found


def _facts(path: Path) -> dict[str, Any] | None:
    try:
        facts = json.loads((path / RUN).read_text())
    except (FileNotFoundError, ValueError):
        return None
    return facts if isinstance(facts, dict) else None


def tell_left_behind(run_dir: Path) -> None:
    """Log the checkpoints of other branches; after an attempt has begun."""
    if paths := left_behind(run_dir):
        log.warning(
            "of a branch that this run has left, and not taken by --resume auto: %s (--resume PATH takes one)",
            ", ".join(path.name for path in paths),
        )


def refuse_used(run_dir: Path) -> None:
    """Refuse a fresh start in a folder that holds checkpoints: they would be mixed with the new run's, and pruned."""
    if newest_first(run_dir):
        raise BadInput(
            f"{run_dir} holds a run already ({names(run_dir)}): go on by --resume auto, or choose another --out_dir"
        )


def prune(run_dir: Path, newest_step: int, *, keep_last: int, keep_every_steps: int = 0) -> None:
    """Remove what is not kept, and what killed saves left behind; called after the one of newest_step is published.

    Kept are the last keep_last whole ones of the history (0 keeps all) and those whose step is a multiple of
    keep_every_steps (0: no such), of any branch. Damaged ones are not counted and not removed: they are for a person to
    look at. Neither are those of later steps, which are of another branch.
    """
    for left_over in (*run_dir.glob(".saving-iter-*"), *run_dir.glob(".removing-iter-*")):
        shutil.rmtree(left_over)
    if keep_last == 0:
        return
    whole = [path for path in newest_first(run_dir) if path.name <= checkpoint_name(newest_step) and is_whole(path)]
    others = left_behind(run_dir)
    kept = [path for path in whole if path not in others][:keep_last]
    for path in whole:
        if path in kept or (keep_every_steps and int(path.name.split("-")[1]) % keep_every_steps == 0):
            continue
        if path in others:
            log.warning("removing %s: it is of a branch that was left, and the run has passed its step", path)
        remove(path)
