"""report.html of a running training, written by another process at each save.

Invariants: the training starts a process and goes on. It waits for none, but for the last one, at most LAST_WAIT_S, at
the end of a run that was not stopped. One process writes at a time, and none is started within PAUSE_S of the last, so
saves in quick succession cost one report. Whatever fails is one warning. The process has a session of its own, so a
Ctrl-C does not end it, and it publishes a whole file or none.
Costs: a fork of the training's process, some ms; then beside it 1 s of one core, 4 s and 0.9 GB for a million lines of
metrics, with the lowest priority.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO

from lit_gpt.cli import ROOT

log = logging.getLogger(__name__)

FILE = "report.html"
PAUSE_S = 10.0
LAST_WAIT_S = 10.0


class RunReport:
    """The reports of one attempt, on rank 0."""

    def __init__(self, run_dir: Path, *, enabled: bool) -> None:
        self._run_dir, self._enabled = run_dir, enabled
        self._process: subprocess.Popen[bytes] | None = None
        self._said: IO[bytes] | None = None
        self._began = -PAUSE_S

    def write(self) -> None:
        """Start a report, unless one is being written or was just now."""
        if not self._ended() or time.monotonic() - self._began < PAUSE_S:
            return
        self._start()

    def close(self, *, wait: bool) -> None:
        """Write the last report, which says how the run ended; wait: for it, and for one that is being written.

        A run that was stopped has few seconds left, in which its exit code must be told: it waits for none."""
        if self._enabled and wait:
            self._wait(LAST_WAIT_S / 2)
        if self._enabled and self._ended():
            self._start()
            if wait:
                self._wait(LAST_WAIT_S)
                self._ended()
        self._enabled = False

    def _start(self) -> None:
        if not self._enabled:
            return
        self._began = time.monotonic()
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        command = [sys.executable, "-m", "lit_gpt.report.write", str(self._run_dir), str(self._run_dir / FILE)]
        try:
            self._said = tempfile.TemporaryFile()  # noqa: SIM115 - _ended reads and closes it
            self._process = subprocess.Popen(
                command, env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}, start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=self._said,
            )  # fmt: skip
        except OSError as error:
            log.warning("%s cannot be written: %s. Training goes on", self._run_dir / FILE, error)

    def _wait(self, seconds: float) -> None:
        if self._process is not None:
            try:
                self._process.wait(seconds)
            except subprocess.TimeoutExpired:
                log.warning("%s takes longer than the end of the run: it may stay as it was", self._run_dir / FILE)

    def _ended(self) -> bool:
        """Whether no report is being written; warns of one that failed."""
        if self._process is None:
            return True
        code = self._process.poll()
        if code is None:
            return False
        if code and self._said is not None:
            self._said.seek(0)
            lines = self._said.read().decode(errors="replace").strip().splitlines() or [f"exit code {code}"]
            log.warning("%s was not written: %s. Training goes on", self._run_dir / FILE, lines[-1])
        if self._said is not None:
            self._said.close()
        self._process = self._said = None
        return True
