"""The report that a training writes beside itself: it says what the run is, and cannot hold or end the run."""

from __future__ import annotations

import logging
import os
import re
import time
from pathlib import Path

import pytest

from lit_gpt.report.run_view import read_run
from lit_gpt.train import run_report
from lit_gpt.train.run_report import RunReport
from tests.report.test_page import data_of
from tests.support.run_folder import killed_and_resumed
from tests.support.training import train


def state_of(page: Path) -> str:
    if not page.exists():
        return "no page"
    found = re.search(r"<dt>state</dt><dd>([\w ]+)<", page.read_text(encoding="utf-8"))
    assert found
    return found[1]


@pytest.mark.slow
def test_a_training_leaves_its_report(store: Path, tmp_path: Path) -> None:
    """Also what it records for it: the pauses, the plan, and how it ended."""
    train(store, tmp_path, report="true", max_steps=8)
    page = tmp_path / "report.html"
    ends = time.monotonic() + 300
    while state_of(page) != "finished":  # on a busy machine the training did not wait for the last one
        assert time.monotonic() < ends
        time.sleep(0.1)
    assert data_of(page.read_text(encoding="utf-8"))[0]["series"][0]["x"]["step"] == list(range(1, 9))
    view = read_run(tmp_path)
    assert view.beats[0].place == "finished"
    assert view.plan["checkpoint_bytes"] == 10_434_048  # 12 bytes for each of 869,504 parameters
    assert (view.plan["steps"], view.plan["memory_gib"]) == (8, None)
    saves, validations = view.metrics.of("save_s"), view.metrics.of("validate_s")
    assert saves[4] > 0  # the save after step 4 is in step 5's line
    assert validations[5] > 0
    assert sum(saves > 0) == 1
    assert sum(validations > 0) == 2


def test_a_report_that_fails_is_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_report, "LAST_WAIT_S", 300.0)
    report = RunReport(tmp_path / "gone", enabled=True)
    with caplog.at_level(logging.WARNING):
        report.close(wait=True)
    (warning,) = caplog.messages
    assert "no such folder" in warning
    assert warning.endswith("Training goes on")


def test_a_report_that_hangs_holds_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_report, "LAST_WAIT_S", 0.2)
    run = killed_and_resumed(tmp_path / "run")
    pipe = run / "watchdog" / "rank-00000.json"
    pipe.unlink()
    os.mkfifo(pipe)  # who reads it waits for a writer
    report = RunReport(run, enabled=True)
    report.write()
    first = report._process
    assert first is not None
    report._began -= 100
    report.write()
    assert report._process is first  # none beside it
    with caplog.at_level(logging.WARNING):
        report.close(wait=True)
    assert ["takes longer than the end of the run" in message for message in caplog.messages] == [True]
    pipe.open("w").close()
    assert first.wait(300) == 0
    assert state_of(run / "report.html") == "finished"


def test_a_run_that_is_stopped_waits_for_no_report(tmp_path: Path) -> None:
    """The last one is started, and ends by itself."""
    run = killed_and_resumed(tmp_path / "run")
    pipe = run / "watchdog" / "rank-00000.json"
    pipe.unlink()
    os.mkfifo(pipe)
    report = RunReport(run, enabled=True)
    report.close(wait=False)
    process = report._process
    assert process is not None
    assert process.poll() is None
    pipe.open("w").close()
    assert process.wait(300) == 0
    assert state_of(run / "report.html") == "finished"


def test_saves_in_quick_succession_cost_one_report(tmp_path: Path) -> None:
    report = RunReport(killed_and_resumed(tmp_path / "run"), enabled=True)
    report.write()
    first = report._process
    assert first is not None
    first.wait(300)
    report._began = time.monotonic()
    report.write()
    assert report._process is None


def test_off_and_other_ranks_write_none(tmp_path: Path) -> None:
    report = RunReport(tmp_path, enabled=False)
    report.write()
    report.close(wait=True)
    assert list(tmp_path.iterdir()) == []
