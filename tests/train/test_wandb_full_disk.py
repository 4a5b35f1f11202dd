"""Weights & Biases on a disk that fills up: its package would lose all lines from then on, and say nothing."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from lit_gpt.train.settings import TrackerSettings
from lit_gpt.train.trackers import Trackers
from tests.support.training import small_disk
from tests.train.test_full_disk import fill
from tests.train.test_trackers import offline_series

wandb = pytest.importorskip("wandb")
pytestmark = pytest.mark.slow

SETTINGS = TrackerSettings(tensorboard=False, wandb="offline")


def write(trackers: Trackers, first: int, last: int) -> None:
    for step in range(first, last + 1):
        trackers.log({"step": step, "loss": step / 4})


def series(run: Path) -> list[tuple[int, float]]:
    """Of the present run; its last lines are on disk when the package's own process has ended."""
    wandb.teardown()
    return offline_series(run, (run / "wandb-id").read_text().splitlines()[0])


def test_a_full_disk_that_is_freed_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """400 lines are more than the package holds back."""
    caplog.set_level(logging.INFO)
    with small_disk(tmp_path / "disk", size=4 << 20) as disk:
        run = disk / "run"
        run.mkdir()
        trackers = Trackers(run, 0, SETTINGS, {})
        left = (run / "wandb-id").read_text()[:8]
        write(trackers, 1, 100)
        fill(disk / "others")
        write(trackers, 101, 300)
        assert f"Weights & Biases: no room for its files in {run}: run {left} is left. Training goes on" in caplog.text
        (disk / "others").unlink()
        write(trackers, 301, 400)
        trackers.close()
        new = (run / "wandb-id").read_text()[:8]
        assert new != left
        assert f"Weights & Biases: there is room again: run {new} gets all lines of metrics.csv" in caplog.text
        assert series(run) == [(step, step / 4) for step in range(1, 401)]


def test_a_disk_that_stays_full(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """The next start sends everything to a new run."""
    with small_disk(tmp_path / "disk", size=4 << 20) as disk:
        run = disk / "run"
        run.mkdir()
        trackers = Trackers(run, 0, SETTINGS, {})
        write(trackers, 1, 10)
        fill(disk / "others")
        write(trackers, 11, 20)
        trackers.close()
        assert not (run / "wandb-id").exists()
        assert "Traceback" not in capfd.readouterr().err
        waiting = Trackers(run, 10, SETTINGS, {})
        assert f"Weights & Biases: no room for its files in {run}: it begins when there is room" in caplog.text
        write(waiting, 11, 12)
        (disk / "others").unlink()
        write(waiting, 13, 20)
        waiting.close()
        assert series(run) == [(step, step / 4) for step in range(1, 21)]
