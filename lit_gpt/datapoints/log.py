"""The datapoint log: which rows each step trained on, and all that is needed to replay and check them.

    run.json     attempts: every start of the training program, with its parent, its slot facts and its details
    steps.jsonl  one line per step, and one per deviation (a skipped step, rows that are left out)

Slot facts are what the meaning of a slot depends on (data sets, order, seed, block size, packing, batch); an attempt
that continues with others was told to (train/data_start.py). Details are the rest (processes, micro-batch, folders, the
slots that rollbacks left out, settings that changed). row_reader.py defines a step's digest.

Invariants: only rank 0 writes, one line after each optimizer step, in one write. Nothing is ever deleted or changed: a
resume is a new attempt that names the step and the attempt after which it continues (its parent), and readers follow
that lineage. Before a checkpoint is published the log is synced, and the checkpoint holds its length and hash (`Mark`).
Costs: some 100 bytes and 10 us per step; opening hashes the log once.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import xxhash

from lit_gpt.cli import BadInput
from lit_gpt.files import publish, sweep
from lit_gpt.locks import Lock, LockHeld

log = logging.getLogger(__name__)

FORMAT_VERSION = 1
FOLDER = "datapoints"
"""The log's folder in a run folder."""
RUN_FILE = "run.json"
STEPS_FILE = "steps.jsonl"
OVERRIDE = "--allow_changed_data"
_CHUNK_BYTES = 1 << 20


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
    """The attempts of the log in `folder`, in order; none where there is no log. BadInput if it is damaged."""
    path = folder / RUN_FILE
    try:
        content = json.loads(path.read_bytes())
        if content["format_version"] != FORMAT_VERSION:
            raise BadInput(f"{path} is of format {content['format_version']}, this program reads {FORMAT_VERSION}")
        return [
            Attempt(**{**entry, "parent": Mark(**entry["parent"]) if entry["parent"] else None})
            for entry in content["attempts"]
        ]
    except FileNotFoundError:
        return []
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise BadInput(f"{path} is damaged ({type(error).__name__}: {error})") from None


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


class DatapointLog:
    """The log of a running training, on rank 0. Steps only rise within an attempt: to go back, open the next one."""

    @classmethod
    def open(
        cls,
        folder: Path,
        slot_facts: Mapping[str, Any],
        *,
        parent: Mark | None = None,
        details: Mapping[str, Any] | None = None,
        foreign: bool = False,
        allow_changed_data: bool = False,
    ) -> DatapointLog:
        """Begin the next attempt, which continues after `parent` (a checkpoint's mark), or starts afresh without one.

        foreign: `parent` is of another run folder, whose log this one goes on from if no step is logged here yet.
        Raises BadInput if another process trains in this folder,
        or if the log does not begin with what `parent` says, which `allow_changed_data` turns into a warning.
        """
        slot_facts = json.loads(json.dumps(slot_facts))  # tuples become lists, as read_attempts gives them
        folder.mkdir(parents=True, exist_ok=True)
        lock = _lock(folder)
        descriptor = os.open(folder / STEPS_FILE, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            sweep(folder, alone=True)
            attempts = read_attempts(folder)
            running = xxhash.xxh3_64()
            begin_bytes, matches = _hash_and_compare(descriptor, running, parent)
            here = bool(attempts) and not (foreign and begin_bytes == 0)
            if parent and here and not (matches and parent.attempt < len(attempts)):
                if parent != lineage(attempts)[-1].parent:  # else this log began with that checkpoint of another run
                    _refuse_or_warn(folder / STEPS_FILE, parent, allow_changed_data)
                here = False
            begin_bytes += _end_torn_line(descriptor, begin_bytes, running)
            started = datetime.now(timezone.utc).isoformat(timespec="seconds")
            parent_here = parent is not None and here
            attempts.append(
                Attempt(len(attempts), parent, parent_here, begin_bytes, started, slot_facts, dict(details or {}))
            )
            _write_attempts(folder, attempts)
        except BaseException:
            os.close(descriptor)
            lock.close()
            raise
        return cls(lock, descriptor, attempts[-1], running)

    def __init__(self, lock: Lock, descriptor: int, attempt: Attempt, running: xxhash.xxh3_64) -> None:
        self.attempt = attempt.attempt
        self._lock = lock
        self._descriptor = descriptor
        self._bytes = attempt.begin_bytes
        self._running = running
        self._step = attempt.parent.step if attempt.parent else 0

    def append(self, step: int, first_slot: int, rows: int, targets: int, digest: int) -> None:
        """Record a finished optimizer step; steps count from 1, `targets` are the valid ones."""
        if step <= self._step:
            raise ValueError(f"step {step} after step {self._step} within one attempt")
        self._step = step
        self._write(
            dict(step=step, slot=first_slot, rows=rows, targets=targets, digest=f"{digest:016x}", attempt=self.attempt)
        )

    def deviation(self, kind: str, step: int, **details: Any) -> None:
        """Record a departure from plain training, such as a skipped step."""
        self._write(dict(deviation=kind, step=step, attempt=self.attempt, **details))

    def flush_and_fsync(self) -> Mark:
        """Sync the log to disk; the checkpoint that is published next holds the mark."""
        os.fsync(self._descriptor)
        return Mark(self.attempt, self._step, self._bytes, self._running.hexdigest())

    def _write(self, record: Mapping[str, Any]) -> None:
        line = json.dumps(record, separators=(",", ":")).encode() + b"\n"
        written = os.write(self._descriptor, line)
        self._running.update(line[:written])
        self._bytes += written
        if written < len(line):
            raise OSError(f"{STEPS_FILE}: {written} of {len(line)} bytes could be written")

    def close(self) -> None:
        os.close(self._descriptor)
        self._lock.close()

    def __enter__(self) -> DatapointLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _lock(folder: Path) -> Lock:
    """Only one training process per run folder."""
    try:
        return Lock(folder / STEPS_FILE)
    except LockHeld:
        raise BadInput(f"another process trains in {folder.parent}: wait for it, or choose another --out_dir") from None


def _hash_and_compare(descriptor: int, running: xxhash.xxh3_64, parent: Mark | None) -> tuple[int, bool]:
    """Hash the whole file; returns its length, and whether it begins with the bytes of `parent`."""
    size, matches = 0, parent is not None and parent.bytes == 0
    while chunk := os.pread(descriptor, _CHUNK_BYTES, size):
        if parent and size < parent.bytes <= size + len(chunk):
            head = running.copy()
            head.update(chunk[: parent.bytes - size])
            matches = head.hexdigest() == parent.xxh3
        running.update(chunk)
        size += len(chunk)
    return size, matches


def _refuse_or_warn(path: Path, parent: Mark, allowed: bool) -> None:
    said = f"{path} does not begin with the {parent.bytes} bytes that the checkpoint was saved with"
    if not allowed:
        raise BadInput(f"{said} (cut, replaced, or another run's): restore it, or pass {OVERRIDE} true")
    log.warning("%s: the record before this attempt is not the checkpoint's", said)


def _end_torn_line(descriptor: int, size: int, running: xxhash.xxh3_64) -> int:
    """End a line that a crash left unfinished; returns the bytes written."""
    if size == 0 or os.pread(descriptor, 1, size - 1) == b"\n":
        return 0
    running.update(b"\n")
    return os.write(descriptor, b"\n")


def _write_attempts(folder: Path, attempts: list[Attempt]) -> None:
    entries = [
        {**attempt._asdict(), "parent": attempt.parent._asdict() if attempt.parent else None} for attempt in attempts
    ]
    content = {"format_version": FORMAT_VERSION, "attempts": entries}
    publish(folder / RUN_FILE, [json.dumps(content, indent=1).encode()])
