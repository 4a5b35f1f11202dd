"""The checkpoints of a run folder as branches: which belong to the run's history, which is resumed, which are kept.

A run that goes back, by --resume PATH to an older step or by a rollback, leaves a branch behind: checkpoints of steps
that the run no longer contains. The datapoint log tells them apart: each start of a run is an attempt that continues
from a mark in an earlier one, and each checkpoint holds its own mark. The run's history is the newest attempt and its
ancestors; in a folder without a log, every checkpoint belongs to it.

Invariants: --resume auto and rollbacks only take checkpoints of the history, that is of the branch that was trained
last, and never another instead of one that is missing. Checkpoints of branches left behind are kept until the history
has passed their step; their removal is logged. A damaged checkpoint is neither counted nor removed.
Costs: each question reads the run.json of every checkpoint; verifying costs what checkpoint.py says.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

from lit_gpt.checkpoint.checkpoint import is_whole, names, newest_first, remove, verified
from lit_gpt.checkpoint.record import MANIFEST, Checkpoint, DamagedCheckpoint, checkpoint_name, described
from lit_gpt.cli import BadInput
from lit_gpt.datapoints.attempts import Mark, is_in_lineage, lineage, read_attempts
from lit_gpt.datapoints.log import FOLDER
from lit_gpt.files import discard

log = logging.getLogger(__name__)

WORDS_FOR_AUTO = ("true", "yes", "on", "last", "latest", "newest")
FOREIGN = (".pth", ".pt", ".bin", ".safetensors")
"""Ends of files that other programs wrote; convert_hf_checkpoint.py reads them, or the folder that they lie in."""


def find(resume: str, run_dir: Path) -> Checkpoint | None:
    """The checkpoint that --resume names, by its folder or a file in it. "auto": the newest whole one of the run's
    history, or None in a run folder where nothing was trained yet.

    Raises BadInput if a named one is missing or damaged, or if "auto" finds damaged ones only; "auto" warns about each
    damaged one that it passes over.
    """
    if resume == "auto":
        return _newest(run_dir)
    path = Path(resume)
    path = path.parent if path.is_file() else path
    if meant := _meant(resume, path, run_dir):
        raise BadInput(f"--resume {resume}: {meant}")
    if not path.is_dir():
        raise BadInput(f"--resume {resume}: no such checkpoint. In {run_dir}: {names(run_dir)}")
    try:
        return verified(path)
    except DamagedCheckpoint as error:
        raise BadInput(f"--resume {resume}: {error}. In {run_dir}: {names(run_dir)}") from None


def _meant(resume: str, path: Path, run_dir: Path) -> str | None:
    """What to type instead of a `resume` that names no checkpoint but says what is meant; None if it does not say."""
    if not path.exists():
        if resume.lower() in WORDS_FOR_AUTO:
            return "did you mean --resume auto, which takes the newest checkpoint of the run folder?"
        step = checkpoint_name(int(resume)) if resume.isdecimal() else resume
        return f"did you mean --resume {run_dir / step}?" if (run_dir / step).is_dir() else None
    foreign_file = Path(resume).is_file() and Path(resume).suffix in FOREIGN and not path.name.startswith("iter-")
    foreign = path if (path / "config.json").is_file() else Path(resume) if foreign_file else None
    if foreign is not None and not (path / MANIFEST).exists():
        return (
            f"no checkpoint of this project; python scripts/convert_hf_checkpoint.py --checkpoint_dir {foreign} "
            f"--destination_path {run_dir / checkpoint_name(0)} makes one of it"
        )
    if not newest_first(path) and not (path / "settings.yaml").is_file():
        return None
    if path.resolve() == run_dir.resolve():
        return "the run folder itself: --resume auto takes its newest checkpoint"
    newest = next(iter(newest_first(path)), None)
    branch = f"; --resume {newest} begins in {run_dir} from there" if newest else ""
    return f"a run folder, not a checkpoint: --out_dir {path} --resume auto continues that run{branch}"


def goes_back(resume: str, found: Checkpoint, run_dir: Path) -> bool:
    """Whether --resume names a checkpoint (`found`) older than others in the run folder, whose steps it leaves."""
    return resume != "auto" and any(path.name > checkpoint_name(found.step) for path in newest_first(run_dir))


def _newest(run_dir: Path) -> Checkpoint | None:
    """The newest whole checkpoint of the history, or that of another run from which the history began."""
    found = next(whole_newest_first(run_dir), None)
    if found is not None:
        return found
    attempts = lineage(read_attempts(run_dir / FOLDER))
    origin = attempts[-1].details.get("resumed_from") if attempts else None
    if origin is not None:
        try:
            return verified(Path(origin))
        except DamagedCheckpoint as error:
            raise BadInput(
                f"--resume auto: {run_dir} has no whole checkpoint, and the one it began from is damaged: {error}"
            ) from None
    if newest_first(run_dir):
        raise BadInput(
            f"--resume auto: no checkpoint in {run_dir} is whole and of the branch trained last ({names(run_dir)}): "
            "choose one by --resume PATH, or another --out_dir"
        )
    return None


def whole_newest_first(run_dir: Path) -> Iterator[Checkpoint]:
    """The history's whole checkpoints, each verified when it is asked for; warns about damaged ones."""
    others = left_behind(run_dir)
    for path in newest_first(run_dir):
        try:
            if path not in others:
                yield verified(path)
        except DamagedCheckpoint as error:
            log.warning("passing over %s: %s", path, error)


def is_newer(step: int, run_dir: Path) -> bool:
    """Whether the history has no checkpoint of this step, or of a later one, in the run folder."""
    others = left_behind(run_dir)
    return not any(path.name >= checkpoint_name(step) for path in newest_first(run_dir) if path not in others)


def is_of_history(checkpoint: Checkpoint, run_dir: Path) -> bool:
    """Whether the checkpoint, which may lie elsewhere, is of the branch that the run in `run_dir` trained last."""
    mark = checkpoint.facts.get("datapoint_log")
    return mark is not None and is_in_lineage(Mark(**mark), read_attempts(run_dir / FOLDER))


def left_behind(run_dir: Path) -> list[Path]:
    """The checkpoints of other branches, newest first; damaged ones are left out."""
    attempts = read_attempts(run_dir / FOLDER)
    if not attempts:
        return []
    from_nothing = lineage(attempts)[-1].parent is None
    found = []
    for path in newest_first(run_dir):
        try:
            mark = described(path).facts.get("datapoint_log")
        except DamagedCheckpoint:
            continue
        # an imported model has no mark: the run can only have begun with it
        if not (is_in_lineage(Mark(**mark), attempts) if mark else from_nothing):
            found.append(path)
    return found


def tell_left_behind(run_dir: Path) -> None:
    """Warn about the checkpoints of other branches; to be called after the attempt has begun."""
    if paths := left_behind(run_dir):
        log.warning(
            "of a branch that this run has left, so --resume auto ignores them: %s (--resume PATH takes one)",
            ", ".join(path.name for path in paths),
        )


def refuse_used(run_dir: Path) -> None:
    """Raise BadInput if the folder holds checkpoints: a fresh run's would be mixed with them, and prune them."""
    if newest_first(run_dir):
        raise BadInput(
            f"{run_dir} holds a run already ({names(run_dir)}): continue by --resume auto, or choose another --out_dir"
        )


def prune(run_dir: Path, newest_step: int, *, keep_last: int, keep_every_steps: int = 0) -> None:
    """Remove old checkpoints, and what killed saves left behind; called after that of newest_step is published.

    Kept are the newest keep_last whole ones of the history (0 keeps all) and, on any branch, those whose step is a
    multiple of keep_every_steps (0: none). Damaged ones are neither counted nor removed: a person should look at them.
    Nor are those of later steps, which belong to another branch.
    """
    for left_over in (*run_dir.glob(".saving-iter-*"), *run_dir.glob(".removing-iter-*")):
        discard(left_over)
    if keep_last == 0:
        return
    whole = [path for path in newest_first(run_dir) if path.name <= checkpoint_name(newest_step) and is_whole(path)]
    others = left_behind(run_dir)
    kept = [path for path in whole if path not in others][:keep_last]
    for path in whole:
        if path in kept or (keep_every_steps and int(path.name.split("-")[1]) % keep_every_steps == 0):
            continue
        if path in others:
            log.warning("removing %s: it is of a branch that the run has left, and the run has passed its step", path)
        remove(path)
