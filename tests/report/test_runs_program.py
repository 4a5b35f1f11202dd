"""scripts/runs.py: a line for each run, from the ends of its files."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lit_gpt.cli import BadInput
from lit_gpt.report.metrics import read
from lit_gpt.report.run_table import run_line
from scripts import runs
from tests.support.programs import INTERRUPTIBLE, ROOT, environment
from tests.support.run_folder import RecordedRun, killed_and_resumed, rolled_back


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, a stopped one deeper down, a killed one, and folders that are no runs."""
    folder = tmp_path_factory.mktemp("runs")
    killed_and_resumed(folder / "a")
    (folder / "group" / "deep").mkdir(parents=True)
    rolled_back(folder / "group" / "b")
    killed = RecordedRun(folder / "c")
    killed.start()
    killed.step(1, loss=7.5)
    killed.end()
    line = (folder / "c" / "metrics.csv").read_text()
    year = time.strftime("%Y-")
    (folder / "c" / "metrics.csv").write_text(line.replace(f",{year}", ",2020-"))
    (folder / ".hidden" / "datapoints").mkdir(parents=True)
    return folder


def test_lines(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs.main([str(folder), "--json"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    told = [(Path(line["folder"]).name, line["state"], line["step"], line["max_steps"], line["loss"]) for line in lines]
    assert told == [("a", "finished", 40, 40, 4.0), ("c", "dead", 1, 40, 7.5), ("b", "stopped", 30, 40, 5.25)]
    assert (lines[0]["val_loss"], lines[0]["tokens_per_s"], lines[0]["model"]) == (5.25, 1000.0, "debug (1.79 M)")


def test_the_table_is_text(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs.main([str(folder / "a"), str(folder / "group")])
    header, first, second = capsys.readouterr().out.splitlines()
    assert header.split("  ")[0] == "run"
    assert header.endswith("last sign of life")
    assert first.split()[4:6] == ["finished", "40/40"]
    assert second.split()[4:6] == ["stopped", "30/40"]
    assert first.endswith(" ago")


def test_no_run_and_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs.main([str(tmp_path)])
    assert capsys.readouterr().out == "no run here\n"
    with pytest.raises(BadInput, match="no such folder"):
        runs.main([str(tmp_path / "no")])
    with pytest.raises(BadInput, match="choose one"):
        runs.main(["--watch", "--json"])


def test_only_the_end_of_metrics_is_read(tmp_path: Path) -> None:
    """The first line that is met is cut, and left out without being counted as damaged."""
    path = tmp_path / "metrics.csv"
    path.write_text("step,loss\n" + "".join(f"{step},{step / 8}\n" for step in range(1, 20_001)))
    tail = read(path, 100)
    assert (tail.of("step")[0], tail.last("step"), tail.last("loss"), tail.damaged) == (19_994, 20_000, 2500, 0)
    assert read(path, 1 << 20).lines == 20_000
    assert run_line(tmp_path).step == 20_000


def test_a_link_to_itself_ends(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path)
    assert runs.look([tmp_path]) == []


@pytest.mark.slow
def test_watch_shows_new_steps_until_it_is_interrupted(tmp_path: Path) -> None:
    run = RecordedRun(tmp_path / "run")
    run.start()
    run.step(1, loss=7.5)
    command = [
        *INTERRUPTIBLE,
        sys.executable,
        str(ROOT / "scripts/runs.py"),
        str(tmp_path),
        "--watch",
        "--interval_s",
        "0.1",
    ]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    while "1/40" not in process.stdout.readline():
        pass
    run.step(2, loss=7.25)
    while "2/40" not in process.stdout.readline():
        pass
    process.send_signal(2)
    process.communicate(timeout=60)
    assert process.returncode == 0
    run.end()
