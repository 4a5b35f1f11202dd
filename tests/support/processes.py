"""How tests of files and locks start another process, and what they look at."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = str(Path(__file__).resolve().parents[2])
DEAD_PID = 2**22 + 1  # above the largest that Linux gives


def start(code: str, *arguments: object) -> subprocess.Popen[str]:
    """Start a Python process that runs the code; sys and files and locks are imported."""
    begin = "import os, signal, sys, time\nfrom pathlib import Path\nfrom lit_gpt import files, locks\n"
    return subprocess.Popen(
        [sys.executable, "-c", begin + code, *map(str, arguments)], env={**os.environ, "PYTHONPATH": ROOT},
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.01)
