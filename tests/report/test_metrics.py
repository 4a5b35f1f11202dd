"""metrics.csv as columns: the same numbers as the line-by-line reader, whatever became of the file."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from lit_gpt.datapoints.run_folder import read_metrics
from lit_gpt.report.metrics import read

HEADER = "step,loss,val_loss,time,attempt\n"
LINES = [
    "1,6.5,,2026-11-27T15:26:49+0000,0\n",
    "2,nan,5.25,2026-11-27T16:26:50+0100,0\n",
    "3,-1e-3,inf,,1\n",
]


def write(folder: Path, *lines: str | bytes) -> Path:
    path = folder / "metrics.csv"
    path.write_bytes(b"".join(line if isinstance(line, bytes) else line.encode() for line in lines))
    return path


def test_columns(tmp_path: Path) -> None:
    found = read(write(tmp_path, HEADER, *LINES))
    np.testing.assert_array_equal(found.of("loss"), [6.5, math.nan, -0.001])
    np.testing.assert_array_equal(found.of("val_loss"), [math.nan, 5.25, math.inf])
    np.testing.assert_array_equal(found.times, [1795793209, 1795793210, math.nan])
    np.testing.assert_array_equal(found.of("attempt"), [0, 0, 1])
    assert (found.last("val_loss"), found.last("loss"), found.last("mfu"), found.damaged) == (5.25, -0.001, None, 0)
    assert not found.has("mfu")


@pytest.mark.parametrize(
    ("damage", "steps", "left_out"),
    [
        (["4,5.5"], [1, 2, 3], 0),  # torn: no newline yet
        (["4,5.5\n"], [1, 2, 3], 1),
        (["x,5.5,,,\n"], [1, 2, 3], 1),
        (["4,5.5,,,0,9\n", "5,5.5,,,0\n"], [1, 2, 3, 5], 1),
        ([b"4,\xff,,,0\n", "5,5.5,,,0\n"], [1, 2, 3, 5], 0),  # line_log warns of these
        ([bytes(512), "\n", "5,5.5,,,0\n"], [1, 2, 3, 5], 0),
        (['4,"5.5,,,0\n', "5,5.5,,,0\n"], [1, 2, 3, 4, 5], 0),
        (["4,five,,yesterday,0\n"], [1, 2, 3, 4], 0),
        (["4,5.5,,2026-11-45T15:26:49+0000,0\n"], [1, 2, 3, 4], 0),
        (["1.5,5.5,,,0\n", "-1,5,,,0\n"], [1, 2, 3], 2),
    ],
)
def test_a_damaged_line_costs_itself(tmp_path: Path, damage: list[str], steps: list[int], left_out: int) -> None:
    found = read(write(tmp_path, HEADER, *LINES, *damage))
    assert found.of("step").tolist() == steps
    assert found.damaged == left_out
    assert found.of("loss")[0] == 6.5


def test_no_file_no_lines_no_step(tmp_path: Path) -> None:
    assert read(tmp_path / "metrics.csv").lines == 0
    for lines, damaged in (([""], 0), ([HEADER], 0), (["loss\n", "5\n"], 1), (["step,step\n", "1,1\n"], 1)):
        found = read(write(tmp_path, *lines))
        assert (found.lines, found.damaged, found.last("loss")) == (0, damaged, None)


def test_it_agrees_with_the_other_reader(tmp_path: Path) -> None:
    path = write(tmp_path, HEADER, *LINES, "4,2.25,,,2\n", "5,1\n")
    by_line = [(int(row["step"]), float(row["loss"])) for row in read_metrics(path)]
    found = read(path)
    assert np.array_equal(np.array(by_line), np.stack([found.of("step"), found.of("loss")], axis=1), equal_nan=True)
