"""Logs that grow by whole lines: written to a disk that may fill up, read whatever became of them.

Invariants: a log never stops a run. Lines that cannot be written (no room, quota, broken disk) wait in memory and are
tried again with the next one; meanwhile the file ends in a whole line, and an alarm is logged once. A reader takes the
lines that end in a newline, are UTF-8 and hold no NUL byte (which a power loss leaves); it says how many others it met.
Costs: one write a line; an outage holds its lines in memory.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from lit_gpt.files import open_own

log = logging.getLogger(__name__)


class LineLog:
    """A file that lines are appended to; it is made if missing."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor: int | None = None
        self._waiting: list[bytes] = []
        self._write()

    def append(self, line: str) -> bytes:
        """Write a line, which ends in its newline, and those that wait; returns what is in the file since this call."""
        return self.append_bytes(line.encode())

    def append_bytes(self, record: bytes) -> bytes:
        """`append` for a record that is no text."""
        self._waiting.append(record)
        return self._write()

    def retry(self) -> bytes:
        """Try again what could not be written; returns as `append`."""
        return self._write() if self._waiting else b""

    def sync(self) -> None:
        """Sync the file to disk; an alarm is logged if that fails."""
        if self._descriptor is not None:
            or_alarm(self._path, partial(os.fsync, self._descriptor))

    def close(self) -> bytes:
        """Try once more what could not be written, and log what is lost; returns as `append`."""
        written = self.retry()
        if self._waiting:
            log.error("%s: the last %d lines are lost: they could not be written", self._path, len(self._waiting))
        if self._descriptor is not None:
            or_alarm(self._path, partial(os.close, self._descriptor))
        return written

    def _write(self) -> bytes:
        pending, alarmed = b"".join(self._waiting), len(self._waiting) > 1
        try:
            if self._descriptor is None:
                self._descriptor = open_own(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            size = os.fstat(self._descriptor).st_size
            if pending and (written := os.write(self._descriptor, pending)) < len(pending):
                os.ftruncate(self._descriptor, size)
                raise OSError(f"only {written} of {len(pending)} bytes could be written")
        except OSError as error:
            if not alarmed:
                log.error("%s cannot be written: %s. Training goes on; its lines wait", self._path, error)
            return b""
        if alarmed:
            log.warning("%s can be written again: %d lines that waited are there", self._path, len(self._waiting))
        self._waiting.clear()
        return pending


def text_line(raw: bytes) -> str | None:
    """A line of a log with its newline; None if it is torn or damaged."""
    if not raw.endswith(b"\n") or b"\0" in raw:
        return None
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return None


def whole_lines(path: Path) -> list[str]:
    """The lines of a log, each with its newline. A last one without (torn, or being written) is left out, and so are
    damaged ones, with a warning."""
    *ended, _ = path.read_bytes().split(b"\n")
    lines = [text_line(line + b"\n") for line in ended]
    if damaged := lines.count(None):
        log.warning("%s: %d damaged lines of %d are left out", path, damaged, len(lines))
    return [line for line in lines if line is not None]


def or_alarm(path: Path, write: Callable[[], object]) -> bool:
    """Write a file that is no checkpoint, or log why not: it never stops a run. Whether it was written."""
    try:
        write()
    except OSError as error:
        log.error("%s cannot be written: %s. Training goes on; the file stays as it was", path, error)
        return False
    return True
