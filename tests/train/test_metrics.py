"""metrics.csv says when each line was written and by which start; files of earlier versions go on."""

from __future__ import annotations

import csv
import errno
import os
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from lit_gpt.train.settings import TrackerSettings
from lit_gpt.train.trackers import COLUMNS, Trackers

OLD = "step,loss,tokens\n1,3.5,100\n2,3.25,200\n3,3.0,300\n4,2.75,400\n"


def test_a_file_of_an_earlier_version_goes_on(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text(OLD)
    trackers = Trackers(tmp_path, 3, TrackerSettings(tensorboard=False), {}, attempt=2)
    trackers.log({"step": 4, "loss": 2.5, "tokens": 400, "mfu": None})
    trackers.close()
    with (tmp_path / "metrics.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert list(lines[0]) == list(COLUMNS)
    found = [(line["step"], line["loss"], line["attempt"]) for line in lines]
    assert found == [("1", "3.5", ""), ("2", "3.25", ""), ("3", "3.0", ""), ("4", "2.5", "2")]
    assert [line["time"] for line in lines[:3]] == ["", "", ""]
    written = datetime.strptime(lines[3]["time"], "%Y-%m-%dT%H:%M:%S%z")
    assert abs(datetime.now(timezone.utc) - written) < timedelta(minutes=5)


@pytest.mark.parametrize("what", ["a folder", "a bad block"])
def test_one_that_cannot_be_read_is_set_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    path, read = tmp_path / "metrics.csv", Path.read_bytes
    if what == "a folder":
        path.mkdir()
    else:
        path.write_text(OLD)

    def read_bytes(self: Path) -> bytes:
        if self == path:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(self))
        return read(self)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_bytes", read_bytes)
        trackers = Trackers(tmp_path, 3, TrackerSettings(tensorboard=False), {})
    trackers.log({"step": 4, "loss": 2.5})
    trackers.close()
    with path.open(newline="") as file:
        assert [(line["step"], line["loss"]) for line in csv.DictReader(file)] == [("4", "2.5")]
    (aside,) = tmp_path.glob("metrics.csv.damaged-*")
    assert aside.is_dir() if what == "a folder" else aside.read_text() == OLD
    reason = {"a folder": "Is a directory", "a bad block": "Input/output error"}[what]
    assert f"{path} cannot be read ({reason}): it stays as {aside.name}" in caplog.text
