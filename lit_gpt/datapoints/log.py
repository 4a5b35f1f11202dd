"""The datapoint log: which rows each step trained on, and all that is needed to replay and check them.

    run.json     attempts: every start of the training program, with its parent, its slot facts and its details;
                 run-copy.json is the same, for the case that one of them is damaged (attempts.py)
    steps.jsonl  one line per step, and one per deviation (a skipped step, rows that are left out)

Slot facts are what the meaning of a slot depends on (data sets, order, seed, block size, packing, batch); an attempt
that continues with others was told to (train/data_start.py). Details are the rest (processes, micro-batch, folders, the
slots that rollbacks left out, settings that changed). row_reader.py defines a step's digest.

Invariants: only rank 0 writes, one line after each optimizer step, in one write. Nothing is ever deleted or changed: a
resume is a new attempt that names the step and the attempt after which it continues (its parent), and readers follow
that lineage. Before a checkpoint is published the log is synced, and the checkpoint holds its length and hash (`Mark`).
While the disk is full, lines and run.json wait and are tried again; a mark is always of what is in the file.
Costs: some 100 bytes and 10 us per step; opening hashes the log once.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import xxhash

from lit_gpt.cli import BadInput
from lit_gpt.datapoints.attempts import (
    Attempt,
    Mark,
    lineage,
    lost_attempts,
    read_attempts,
    set_damaged_aside,
    write_attempts,
)
from lit_gpt.datapoints.line_log import LineLog
from lit_gpt.files import sweep
from lit_gpt.locks import Lock, LockHeld

log = logging.getLogger(__name__)

FOLDER = "datapoints"
"""The log's folder in a run folder."""
STEPS_FILE = "steps.jsonl"
VERIFIED = "verified.json"
"""What `scripts/datapoints.py verify` found last."""
OVERRIDE = "--allow_changed_data"
_CHUNK_BYTES = 1 << 20
_ATTEMPT = re.compile(rb'"attempt":(\d{1,9})')


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
        try:
            sweep(folder, alone=True)
            set_damaged_aside(folder)
            attempts = read_attempts(folder)
            head, matches = _read_log(folder / STEPS_FILE, parent)
            lost = not attempts and parent is not None and head.size > 0 and not foreign
            if lost:
                attempts = lost_attempts(max(head.last_attempt, parent.attempt if parent else 0) + 1)
            here = bool(attempts) and not lost and not (foreign and head.size == 0)
            if parent and here and not (matches and parent.attempt < len(attempts)):
                if parent != lineage(attempts)[-1].parent:  # else this log began with that checkpoint of another run
                    _refuse_or_warn(folder / STEPS_FILE, parent, allow_changed_data)
                here = False
            begin_bytes = head.size + bool(head.cut)
            started = datetime.now(timezone.utc).isoformat(timespec="seconds")
            parent_here = parent is not None and here
            attempts.append(
                Attempt(len(attempts), parent, parent_here, begin_bytes, started, slot_facts, dict(details or {}))
            )
            return cls(folder, lock, head, attempts)
        except BaseException:
            lock.close()
            raise

    def __init__(self, folder: Path, lock: Lock, head: _Head, attempts: list[Attempt]) -> None:
        attempt = attempts[-1]
        self.attempt = attempt.attempt
        self._folder, self._lock = folder, lock
        self._attempts, self._attempts_written = attempts, write_attempts(folder, attempts)
        self._lines = LineLog(folder / STEPS_FILE)
        self._bytes, self._running = head.size, head.running
        self._step = attempt.parent.step if attempt.parent else 0
        if head.cut:
            log.warning("%s: %s", folder / STEPS_FILE, _said_of_cut(head.cut))
            self._count(self._lines.append("\n"))

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
        """Sync the log to disk; the checkpoint that is published next holds the mark, of what is in the file."""
        self._count(self._lines.retry())
        if not self._attempts_written:
            self._attempts_written = write_attempts(self._folder, self._attempts)
        self._lines.sync()
        return Mark(self.attempt, self._step, self._bytes, self._running.hexdigest())

    def _write(self, record: Mapping[str, Any]) -> None:
        self._count(self._lines.append(json.dumps(record, separators=(",", ":")) + "\n"))

    def _count(self, written: bytes) -> None:
        self._running.update(written)
        self._bytes += len(written)

    def close(self) -> None:
        self._count(self._lines.close())
        if not self._attempts_written:
            write_attempts(self._folder, self._attempts)
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


class _Head(NamedTuple):
    """What steps.jsonl holds when an attempt begins."""

    size: int
    """In bytes."""
    running: xxhash.xxh3_64
    """Of all its bytes."""
    cut: bytes
    """Its last line, if a crash cut it; of a longer one the last 1 MiB."""
    last_attempt: int
    """That wrote its last line; 0 if it has none."""


def _read_log(path: Path, parent: Mark | None) -> tuple[_Head, bool]:
    """Hash the whole file; also returns whether it begins with the bytes of `parent`, or lacks only their last newline,
    which the next attempt writes."""
    size, matches, running, tail = 0, parent is not None and parent.bytes == 0, xxhash.xxh3_64(), b""
    if path.exists():
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                if parent and size < parent.bytes <= size + len(chunk):
                    head = running.copy()
                    head.update(chunk[: parent.bytes - size])
                    matches = head.hexdigest() == parent.xxh3
                running.update(chunk)
                size += len(chunk)
                tail = (tail + chunk)[-_CHUNK_BYTES:]
    if parent and size + 1 == parent.bytes:
        ended = running.copy()
        ended.update(b"\n")
        matches = ended.hexdigest() == parent.xxh3
    last = max((int(number) for number in _ATTEMPT.findall(tail)), default=0)
    return _Head(size, running, tail[tail.rfind(b"\n") + 1 :], last), matches


def _said_of_cut(line: bytes) -> str:
    """What becomes of a last line without its newline."""
    try:
        json.loads(line)
    except ValueError:
        nul = " of NUL" if not line.strip(b"\0") else ""
        return f"it ends in {len(line):,} bytes{nul} that are no whole line, as a crash leaves them: no steps"
    return "its last line lacked its newline, which is added"


def begins_with(folder: Path, mark: Mark) -> bool:
    """Whether steps.jsonl in `folder` begins with the bytes of `mark`. Cost: the file is hashed."""
    return _read_log(folder / STEPS_FILE, mark)[1]


def _refuse_or_warn(path: Path, parent: Mark, allowed: bool) -> None:
    said = f"{path} does not begin with the {parent.bytes} bytes that the checkpoint was saved with"
    if not allowed:
        raise BadInput(f"{said} (cut, replaced, or another run's): restore it, or pass {OVERRIDE} true")
    log.warning("%s: the record before this attempt is not the checkpoint's", said)
