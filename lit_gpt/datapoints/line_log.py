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
from pathlib import Path

log = logging.getLogger(__name__)


class LineLog:
    """A file that lines are appended to; it is made if missing."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor: int | None = None
        self._waiting: list[bytes] = []
        self._write()

    def append(self, line: str) -> None:
        """Write a line, which ends in its newline, and those that wait."""
        self._waiting.append(line.encode())
        self._write()

    def close(self) -> None:
        """Try once more what could not be written; what is lost is logged."""
        if self._waiting:
            self._write()
        if self._waiting:
            log.error("%s: the last %d lines are lost: they could not be written", self._path, len(self._waiting))
        if self._descriptor is not None:
            os.close(self._descriptor)

    def _write(self) -> None:
        pending, alarmed = b"".join(self._waiting), len(self._waiting) > 1
        try:
            if self._descriptor is None:
                self._descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            size = os.fstat(self._descriptor).st_size
            if pending and (written := os.write(self._descriptor, pending)) < len(pending):
                os.ftruncate(self._descriptor, size)
                raise OSError(f"only {written} of {len(pending)} bytes could be written")
        except OSError as error:
            if not alarmed:
                log.error("%s cannot be written: %s. Training goes on; its lines wait", self._path, error)
            return
        if alarmed:
            log.warning("%s can be written again: %d lines that waited are there", self._path, len(self._waiting))
        self._waiting.clear()


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
