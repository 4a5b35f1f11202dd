"""metrics.csv says when each line was written and by which start; files of earlier versions go on."""

from __future__ import annotations

import csv
from datetime import datetime, timedelta, timezone
from pathlib import Path

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
