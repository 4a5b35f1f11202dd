"""What the log says of a start: the seconds of each phase, since the command or since the fault that it mends."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lit_gpt.launch import start_phases
from lit_gpt.launch.cause import CAUSE_FILE
from lit_gpt.launch.restarts import Restarts, take_cause
from lit_gpt.launch.start_phases import StartPhases

PROGRAM = """
import time
began = time.time()
from lit_gpt.launch.start_phases import process_start
print(began - process_start())
"""


def test_a_process_knows_when_it_began() -> None:
    asked = time.time()
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=100, check=True)
    took_s = time.time() - asked
    assert -0.02 <= float(done.stdout) <= took_s + 0.02, "the clock's ticks are 10 ms"


def test_each_phase_has_its_seconds(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    clock = iter([103.5, 104.0, 110.25])
    monkeypatch.delenv("RUN_REPORT", raising=False)
    monkeypatch.setattr(start_phases, "process_start", lambda: 100.0)
    monkeypatch.setattr(start_phases, "time", SimpleNamespace(time=lambda: next(clock)))
    caplog.set_level(logging.INFO)
    phases = StartPhases()
    phases.end("model")
    phases.step_done(torch.zeros(()))
    phases.step_done(torch.zeros(()))
    assert [record.message for record in caplog.records] == [
        "first step done 10.2 s since the command: imports 3.5, model 0.5, first step 6.2"
    ]


def test_after_a_fault_the_phases_begin_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cause = {"at": 90.0, "step": 5, "node": "n1", "name": "rank 1", "how": "ended", "code": 1, "place": "save"}
    (tmp_path / CAUSE_FILE).write_text(json.dumps(cause))
    known = Restarts(3)
    known.after(137, take_cause(tmp_path))
    known.remember(tmp_path, 90.0, 94.0)
    monkeypatch.setenv("RUN_REPORT", str(tmp_path))
    monkeypatch.setattr(start_phases, "process_start", lambda: 95.5)
    monkeypatch.setattr(start_phases, "time", SimpleNamespace(time=lambda: 99.0))
    assert StartPhases().in_words() == "9.0 s since the fault: end of the old ranks 4.0, launch 1.5, imports 3.5"
