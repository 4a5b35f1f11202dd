"""The attempts of a run, in its datapoint log: every start of the training program, and what it continued from.

run.json holds them, and run-copy.json again. Each has a format version and a hash of the rest, so that one wrong bit in
either costs nothing: readers take the other. Files of earlier versions have no hash and no copy.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypedDict

import msgspec
import xxhash

from lit_gpt.cli import BadInput
from lit_gpt.datapoints.line_log import or_alarm
from lit_gpt.files import OWN_JSON_BYTES, publish, read_json

log = logging.getLogger(__name__)

FORMAT_VERSION = 1
RUN_FILE, COPY_FILE = "run.json", "run-copy.json"
_LOST = {"lost": True}
"""The details of an attempt whose record was damaged."""
_Count = Annotated[int, msgspec.Meta(ge=0)]


class _Damaged(BadInput):
    """A file is not what was written, or cannot be read."""


class _Mark(TypedDict):
    attempt: _Count
    step: _Count
    bytes: _Count
    xxh3: str


class _Entry(TypedDict):
    attempt: _Count
    parent: _Mark | None
    parent_here: bool
    begin_bytes: _Count
    started: str
    facts: dict[str, Any]
    details: dict[str, Any]


class _Content(TypedDict):
    format_version: Literal[1]
    attempts: list[_Entry]


class Mark(NamedTuple):
    """Where the log stood when a checkpoint was saved; the checkpoint holds it, as JSON (`_asdict`)."""

    attempt: int
    step: int
    bytes: int
    xxh3: str
    """Hash of the first `bytes` bytes of steps.jsonl."""


class Attempt(NamedTuple):
    """One start of the training program."""

    attempt: int
    parent: Mark | None
    """Where it continued from; None for a fresh start."""
    parent_here: bool
    """Whether the parent is in this log, not in another run's."""
    begin_bytes: int
    """Offset of its first line in steps.jsonl."""
    started: str
    """UTC, as ISO 8601."""
    facts: Mapping[str, Any]
    """The slot facts."""
    details: Mapping[str, Any]

    @property
    def data_from_step(self) -> int:
        """The step after which its data began at slot 0."""
        number: int = self.details.get("data_from_step", 0)
        return number


def read_attempts(folder: Path) -> list[Attempt]:
    """The attempts of the log in `folder`, in order; none where there is no log. BadInput if both files are damaged."""
    damaged: list[str] = []
    for path in (folder / RUN_FILE, folder / COPY_FILE):
        try:
            attempts = _read(path)
        except _Damaged as error:
            damaged.append(str(error))
            continue
        if attempts is not None:
            if path.name == COPY_FILE:
                log.warning("%s: %s replaces it", damaged[0] if damaged else f"{folder / RUN_FILE} is missing", path)
            return attempts
    if damaged:
        raise _Damaged("; ".join(damaged))
    return []


def set_damaged_aside(folder: Path) -> None:
    """Before a start reads them: rename files of attempts of which none can be read, with a warning. A log stops no
    run; which checkpoints are of branches that the run left is then unknown."""
    try:
        read_attempts(folder)
    except _Damaged as error:
        suffix = f"damaged-{time.time_ns()}"
        for path in (folder / RUN_FILE, folder / COPY_FILE):
            if path.exists():
                os.replace(path, path.with_name(f"{path.name}.{suffix}"))
        log.warning(
            "%s. It stays as *.%s; the record of the steps before this start is lost, and every checkpoint here counts "
            "as this run's",
            error, suffix,
        )  # fmt: skip


def write_attempts(folder: Path, attempts: Sequence[Attempt]) -> bool:
    """Publish both files; whether they are there, else an alarm is logged."""
    entries = [
        {**attempt._asdict(), "parent": attempt.parent._asdict() if attempt.parent else None} for attempt in attempts
    ]
    content = {"format_version": FORMAT_VERSION, "attempts": entries}
    text = json.dumps({**content, "xxh3": _hash(content)}, indent=1).encode()
    paths = (folder / RUN_FILE, folder / COPY_FILE)
    return all(or_alarm(path, partial(publish, path, [text])) for path in paths)


def lost_attempts(count: int) -> list[Attempt]:
    """What stands for attempts whose record was damaged, so that their numbers are not given again."""
    return [Attempt(number, None, False, 0, "", {}, _LOST) for number in range(count)]


def _read(path: Path) -> list[Attempt] | None:
    """The attempts in one file; None if it is missing. Raises _Damaged, or BadInput for another format."""
    if not path.is_file():
        return None
    try:
        content = read_json(path, OWN_JSON_BYTES)
        saved = content.pop("xxh3", None)
        if saved is not None and saved != _hash(content):
            raise BadInput(f"its hash is not {saved}")
    except BadInput as error:
        raise _Damaged(f"{path} is damaged: {error}") from None
    if saved is not None and content.get("format_version") != FORMAT_VERSION:
        raise BadInput(f"{path} is of format {content.get('format_version')}, this program reads {FORMAT_VERSION}")
    try:
        msgspec.convert(content, _Content)
    except msgspec.ValidationError as error:
        raise _Damaged(f"{path} is damaged: {error}") from None
    found = [
        Attempt(**{**entry, "parent": Mark(**entry["parent"]) if entry["parent"] else None})
        for entry in content["attempts"]
        if entry.keys() == _Entry.__annotations__.keys()
    ]
    wrong = [n for n, attempt in enumerate(found) if attempt.attempt != n or not _parent_is_earlier(attempt)]
    if wrong or len(found) < len(content["attempts"]) or content.keys() != _Content.__annotations__.keys():
        raise _Damaged(f"{path} is damaged: its attempts do not follow from each other")
    return found


def _parent_is_earlier(attempt: Attempt) -> bool:
    return not attempt.parent_here or (attempt.parent is not None and attempt.parent.attempt < attempt.attempt)


def _hash(content: Mapping[str, Any]) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(content, sort_keys=True).encode())


def lineage(attempts: Sequence[Attempt]) -> list[Attempt]:
    """The newest attempt and those it continues, newest first, as far as they are in this log."""
    found = list(attempts[-1:])
    while found and (parent := found[-1].parent) is not None and found[-1].parent_here:
        found.append(attempts[parent.attempt])
    return found


def is_in_lineage(mark: Mark, attempts: Sequence[Attempt]) -> bool:
    """Whether the run's lineage passes through `mark`; not if the run has gone back to before it."""
    until = mark.step
    for attempt in lineage(attempts):
        if attempt.attempt == mark.attempt:
            return mark.step <= until
        if attempt.parent == mark:  # perhaps in another run's log
            return True
        until = min(until, attempt.parent.step) if attempt.parent else until
    return False
