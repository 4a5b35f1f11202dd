"""What a process that hangs leaves in the run folder's watchdog/: where each of its threads is, and its collectives."""

from __future__ import annotations

import faulthandler
import os
import time
from collections.abc import Callable
from pathlib import Path

from lit_gpt.files import open_own


def stacks_file(folder: Path, rank: int) -> Path:
    return folder / f"stacks-rank-{rank:05d}.txt"


def write_stacks(folder: Path, rank: int, why: str, dump_collectives: Callable[[Path, int], None]) -> None:
    """Append the stacks of all threads to the rank's file, below the time and `why`. Raises OSError."""
    with os.fdopen(open_own(stacks_file(folder, rank), os.O_WRONLY | os.O_APPEND | os.O_CREAT), "a") as file:
        file.write(f"\n{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {why}\n")
        file.flush()
        faulthandler.dump_traceback(file, all_threads=True)
    dump_collectives(folder, rank)
