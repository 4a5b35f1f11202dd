"""Logs on a disk that fills up to the last byte and is freed again, and logs with any bit flipped."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from lit_gpt.datapoints.line_log import LineLog, whole_lines
from lit_gpt.datapoints.log import FOLDER, DatapointLog
from lit_gpt.datapoints.run_folder import read_metrics
from lit_gpt.datapoints.run_record import RunRecord
from lit_gpt.train.settings import TrackerSettings
from lit_gpt.train.trackers import Trackers
from tests.support.training import small_disk

QUIET = TrackerSettings(tensorboard=False)


def test_a_full_disk_that_is_freed_again_costs_no_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    with small_disk(tmp_path / "disk", size=64 << 10) as disk:
        log = LineLog(disk / "log")
        log.append("0\n")
        with (disk / "others").open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
            file.writelines(itertools.repeat(bytes(4096)))
        lines = ["0\n", *(f"{number}{'x' * 1000}\n" for number in range(1, 20))]
        for line in lines[1:]:
            log.append(line)
        assert whole_lines(disk / "log") == lines[: len(whole_lines(disk / "log"))]
        assert (disk / "log").read_bytes().endswith(b"\n")
        assert caplog.text.count("cannot be written") == 1
        (disk / "others").unlink()
        log.append("end\n")
        log.close()
        assert whole_lines(disk / "log") == [*lines, "end\n"]
        assert "can be written again" in caplog.text


def test_what_can_never_be_written_is_told(caplog: pytest.LogCaptureFixture) -> None:
    log = LineLog(Path("/dev/full"))
    log.append("1\n")
    log.append("2\n")
    log.close()
    assert "cannot be written" in caplog.text
    assert "the last 2 lines are lost" in caplog.text


def written(run_dir: Path) -> bytes:
    trackers = Trackers(run_dir, 0, QUIET, {})
    for step in range(1, 6):
        trackers.log({"step": step, "loss": 6.25 - step, "tokens": 60 * step})
    trackers.close()
    return (run_dir / "metrics.csv").read_bytes()


@pytest.mark.parametrize("every", [31, pytest.param(1, marks=pytest.mark.long)])
def test_metrics_with_a_flipped_bit_stop_no_run(tmp_path: Path, every: int) -> None:
    whole, path = written(tmp_path), tmp_path / "metrics.csv"
    for bit in range(0, 8 * len(whole), every):
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        Trackers(tmp_path, 3, QUIET, {}).close()
        assert all(int(row["step"]) <= 3 for row in read_metrics(path))
    path.write_bytes(whole[:-30] + bytes(30) + b"\n")
    assert [row["step"] for row in read_metrics(path)] == ["1", "2", "3", "4"]
    path.write_bytes(whole.replace(b"\n3,", b'\n3,"'))
    assert [row["step"] for row in read_metrics(path)] == ["1", "2", "4", "5"]


def test_columns_of_another_version_stay(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,loss,gone\n1,5.5,7\n2,4.5,8\n3,3.5,9\n")
    trackers = Trackers(tmp_path, 2, QUIET, {})
    trackers.log({"step": 3, "loss": 2.5})
    trackers.close()
    rows = read_metrics(tmp_path / "metrics.csv")
    assert [(row["step"], row["loss"], row["gone"]) for row in rows] == [
        ("1", "5.5", "7"), ("2", "4.5", "8"), ("3", "2.5", ""),
    ]  # fmt: skip


@pytest.mark.parametrize("every", [11, pytest.param(1, marks=pytest.mark.long)])
def test_a_datapoint_log_with_a_flipped_bit_can_be_asked(tmp_path: Path, every: int) -> None:
    with DatapointLog.open(tmp_path / FOLDER, {"seed": 1}) as log:
        for step in range(1, 6):
            log.append(step, 8 * (step - 1), 8, 60, digest=step)
        log.deviation("left_out", 6, first_slot=40, rows=8)
    path = tmp_path / FOLDER / "steps.jsonl"
    whole = path.read_bytes()
    for bit in range(0, 8 * len(whole), every):
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        with RunRecord(tmp_path / FOLDER) as run:
            assert len(list(run.steps())) <= 5
            run.last(), run.step(3), run.step_of(20), run.deviations()
    path.write_bytes(whole + bytes(4096) + b"\n")
    with RunRecord(tmp_path / FOLDER) as run:
        assert [record.step for record in run.steps()] == [1, 2, 3, 4, 5]
        assert len(run.torn) == 1
