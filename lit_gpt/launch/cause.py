"""Why the ranks of a run end: which rank, and what happened to it."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path

from lit_gpt.cli import EXIT_FAILURE

ENDED, SILENT, FAILED = "ended", "was silent", "failed"
"""How `Cause.how` begins."""

CAUSE_FILE = "cause.json"
"""In $RUN_REPORT: the cause, for who may start the run again (restarts.py)."""
MEMORY_FILE = "restarts.json"
"""In $RUN_REPORT: what is remembered of the starts before."""


@dataclass(frozen=True)
class Cause:
    """Why the ranks end."""

    rank: int
    name: str
    """Of the rank: world.rank_name."""
    host: str
    node: str
    """As Slurm names it; else the host's name."""
    pid: int
    how: str
    """What happened, as a line of the log says it; begins as one of the words above."""
    code: int = EXIT_FAILURE
    """With which all ranks end."""
    step: int = 0
    """Updates that the ranks had done."""
    place: str = "set-up"
    """What it was doing when it was last heard of, as the watchdog names it."""
    at: float = field(default_factory=time.time)
    """When it was found, in seconds since the epoch."""

    def __str__(self) -> str:
        where = f"in step {self.step + 1}, last heard of at {self.place!r}"
        return f"{self.name} (process {self.pid}) {self.how}, {where}: all ranks end"


def kill_if_stopped(cause: Cause, host: str) -> None:
    """A rank that was stopped, on this machine, is killed: its launcher would wait for it."""
    stat = Path(f"/proc/{cause.pid}/stat")
    try:
        if cause.host == host and stat.read_text().rsplit(")", 1)[1].split()[0] in "Tt":
            os.kill(cause.pid, signal.SIGKILL)
    except (OSError, IndexError):  # it has ended, or is not this user's
        return
