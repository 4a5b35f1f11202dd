"""The datapoint log: lineage over attempts, marks, torn lines, refusals, and a writer killed by SIGKILL."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import xxhash

from lit_gpt.cli import BadInput
from lit_gpt.datapoints.attempts import Mark
from lit_gpt.datapoints.log import DatapointLog
from lit_gpt.datapoints.run_record import RunRecord
from tests.support.no_locks import NO_LOCKS, without_locks

FACTS = {"datasets": ["a1"], "seed": 1, "block_size": 16, "packing": "window", "global_batch_size": 8}


def write(log: DatapointLog, first: int, last: int) -> Mark:
    for step in range(first, last + 1):
        log.append(step, (step - 1) * 8, 8, 100 + log.attempt, digest=step * 1000 + log.attempt)
    return log.flush_and_fsync()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run" / "datapoints"


def test_the_lineage_goes_back_through_the_checkpoints_that_were_resumed(folder: Path) -> None:
    with DatapointLog.open(folder, FACTS, details={"world_size": 4}) as log:
        at_5, _ = write(log, 1, 5), write(log, 6, 9)
    with DatapointLog.open(folder, FACTS, parent=at_5) as log:
        at_7, _ = write(log, 6, 7), write(log, 8, 12)
    with DatapointLog.open(folder, FACTS, parent=at_7) as log:
        write(log, 8, 8)
    with DatapointLog.open(folder, FACTS, parent=at_5, details={"world_size": 2}) as log:
        log.deviation("skipped", 6, rows=[3, 4])
        write(log, 7, 10)
    with RunRecord(folder) as run:
        assert [(record.step, record.attempt) for record in run.steps()] == [
            (1, 0), (2, 0), (3, 0), (4, 0), (5, 0), (7, 3), (8, 3), (9, 3), (10, 3),
        ]  # fmt: skip
        assert [run.step(number) and run.step(number).digest for number in (0, 5, 6, 7, 10, 11)] == [
            None, 5000, None, 7003, 10003, None,
        ]  # fmt: skip
        steps = [run.step_of(slot) for slot in (0, 7, 8, 39, 40, 47, 48, 79, 80)]
        assert [record and record.step for record in steps] == [1, 1, 2, 5, None, None, 7, 10, None]
        assert run.deviations() == [{"deviation": "skipped", "step": 6, "attempt": 3, "rows": [3, 4]}]
        assert [attempt.details for attempt in run.attempts] == [{"world_size": 4}, {}, {}, {"world_size": 2}]
        assert run.torn == set()


def test_a_line_is_short_and_a_mark_is_the_file_s_hash(folder: Path) -> None:
    with DatapointLog.open(folder, FACTS) as log:
        log.append(1_430_512, 1_464_844_288, 1024, 2_093_056, 2**64 - 1)
        mark = log.flush_and_fsync()
    raw = (folder / "steps.jsonl").read_bytes()
    assert len(raw) <= 0.0001 * 1024 * 2048 * 2  # 0.01 % of the step's token bytes
    assert mark == Mark(0, 1_430_512, len(raw), xxhash.xxh3_64_hexdigest(raw))
    assert Mark(**json.loads(json.dumps(mark._asdict()))) == mark


def test_each_attempt_has_its_own_facts(folder: Path) -> None:
    """Whether an attempt may continue with other facts is not the log's business (tests/train/test_data_start.py)."""
    with DatapointLog.open(folder, FACTS) as log:
        mark = write(log, 1, 2)
    with DatapointLog.open(folder, {**FACTS, "seed": 2}, parent=mark) as log:
        write(log, 3, 4)
    with RunRecord(folder) as run:
        assert [segment.attempt.facts["seed"] for segment in run.lineage] == [1, 2]
        assert [record.step for record in run.steps()] == [1, 2, 3, 4]


def test_slots_that_begin_again_with_new_data(folder: Path) -> None:
    """Two steps, then two of new data from slot 0 on: a slot's step depends on which data is meant."""
    with DatapointLog.open(folder, FACTS) as log:
        mark = write(log, 1, 2)
    with DatapointLog.open(folder, {**FACTS, "seed": 2}, parent=mark, details={"data_from_step": 2}) as log:
        log.append(3, 0, 8, 100, 3)
        log.append(4, 8, 8, 100, 4)
    with RunRecord(folder) as run:
        assert run.data_starts() == [0, 2]
        found = {start: [run.step_of(slot, start) for slot in (0, 8, 16)] for start in (0, 2)}
        assert {start: [r and r.step for r in records] for start, records in found.items()} == {
            0: [1, 2, None],
            2: [3, 4, None],
        }
        assert run.step_of(0).step == 3
        assert (run.consumed(0), run.consumed(2), run.consumed()) == (16, 16, 16)


def test_an_attempt_without_a_step_binds_nothing(folder: Path, tmp_path: Path) -> None:
    """A start that trained nothing, then a checkpoint of another run; once a step is logged, that is refused."""
    with DatapointLog.open(tmp_path / "other", FACTS) as log:
        mark = write(log, 1, 4)
    DatapointLog.open(folder, FACTS).close()
    with pytest.raises(BadInput, match="does not begin with the"):  # of this folder: its log was lost
        DatapointLog.open(folder, FACTS, parent=mark)
    with DatapointLog.open(folder, {**FACTS, "seed": 2}, parent=mark, foreign=True) as log:
        write(log, 5, 6)
    with RunRecord(folder) as run:
        assert [record.step for record in run.steps()] == [5, 6]
    other = mark._replace(xxh3="0" * 16)
    with pytest.raises(BadInput, match="does not begin with the"):
        DatapointLog.open(folder, FACTS, parent=other, foreign=True)


def test_a_log_that_is_not_the_checkpoint_s_is_refused(folder: Path) -> None:
    with DatapointLog.open(folder, FACTS) as log:
        mark = write(log, 1, 2)
    path = folder / "steps.jsonl"
    whole = path.read_bytes()
    for damaged in (whole[:-5], whole.replace(b'"targets":100', b'"targets":101')):
        path.write_bytes(damaged)
        with pytest.raises(BadInput, match="does not begin with the"):
            DatapointLog.open(folder, FACTS, parent=mark)
    with DatapointLog.open(folder, FACTS, parent=mark, allow_changed_data=True) as log:
        write(log, 3, 3)
    with RunRecord(folder) as run:
        assert [record.step for record in run.steps()] == [3]


def test_a_checkpoint_of_another_folder_begins_a_log_of_its_own(folder: Path, tmp_path: Path) -> None:
    with DatapointLog.open(folder, FACTS) as log:
        mark = write(log, 1, 4)
    other = tmp_path / "other" / "datapoints"
    with DatapointLog.open(other, FACTS, parent=mark) as log:
        write(log, 5, 6)
    with RunRecord(other) as run:
        assert [record.step for record in run.steps()] == [5, 6]
        assert (run.lineage[0].attempt.parent, run.lineage[0].attempt.parent_here) == (mark, False)


def test_a_torn_line_is_closed_counted_and_costs_no_other(folder: Path) -> None:
    with DatapointLog.open(folder, FACTS) as log:
        mark = write(log, 1, 2)
    with open(folder / "steps.jsonl", "ab") as file:
        file.write(b'{"step":3,"slo')
    with DatapointLog.open(folder, FACTS, parent=mark) as log:
        assert write(log, 3, 4).xxh3 == xxhash.xxh3_64_hexdigest((folder / "steps.jsonl").read_bytes())
    with RunRecord(folder) as run:
        assert [record.step for record in run.steps()] == [1, 2, 3, 4]
        assert run.torn == {mark.bytes}
    assert b'{"step":3,"slo\n' in (folder / "steps.jsonl").read_bytes()


def test_a_log_that_lacks_only_its_last_newline_goes_on(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with DatapointLog.open(folder, FACTS) as log:
        mark = write(log, 1, 2)
    path = folder / "steps.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with DatapointLog.open(folder, FACTS, parent=mark) as log:
        later = write(log, 3, 4)
    assert caplog.messages == [f"{path}: its last line lacked its newline, which is added"]
    assert path.read_bytes().startswith(whole)
    assert later.xxh3 == xxhash.xxh3_64_hexdigest(path.read_bytes())
    with RunRecord(folder) as run:
        assert [record.step for record in run.steps()] == [1, 2, 3, 4]
        assert run.torn == set()
    path.write_bytes(whole[:-2] + b" ")  # as long as it should be, but for the newline
    with pytest.raises(BadInput, match="does not begin with the"):
        DatapointLog.open(folder, FACTS, parent=mark)


@pytest.mark.parametrize(("tail", "said"), [(bytes(37), "37 bytes of NUL"), (b'{"step":3,"slo', "14 bytes")])
def test_what_a_crash_left_behind_the_mark_is_told(
    folder: Path, caplog: pytest.LogCaptureFixture, tail: bytes, said: str
) -> None:
    with DatapointLog.open(folder, FACTS) as log:
        mark = write(log, 1, 2)
    with open(folder / "steps.jsonl", "ab") as file:
        file.write(tail)
    DatapointLog.open(folder, FACTS, parent=mark).close()
    (told,) = caplog.messages
    assert told.startswith(f"{folder}/steps.jsonl: it ends in {said} that are no whole line")


def test_steps_only_rise_within_an_attempt(folder: Path) -> None:
    with DatapointLog.open(folder, FACTS) as log:
        write(log, 1, 2)
        with pytest.raises(ValueError, match="step 2 after step 2"):
            log.append(2, 8, 8, 1, 1)


WRITER = """
import sys
from pathlib import Path
from lit_gpt.datapoints.log import DatapointLog
log = DatapointLog.open(Path(sys.argv[1]), {"seed": 1})
for step in range(1, 10**9):
    log.append(step, step * 8, 8, 1, 1)
    if step == 20:
        print("ready", flush=True)
"""


def start_writer(folder: Path, before: str) -> subprocess.Popen:
    root = str(Path(__file__).resolve().parents[2])
    process = subprocess.Popen(
        [sys.executable, "-c", before + WRITER, str(folder)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": root},
    )
    assert process.stdout.readline() == b"ready\n"
    return process


@pytest.mark.parametrize("locks", [True, False])
def test_a_killed_writer_loses_no_step_and_blocks_nobody(
    folder: Path, locks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With locks, and on a file system without."""
    if not locks:
        without_locks(monkeypatch)
    process = start_writer(folder, "" if locks else NO_LOCKS)
    with pytest.raises(BadInput, match="another process trains in"):
        DatapointLog.open(folder, {"seed": 1})
    time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with RunRecord(folder) as run:
        steps = [record.step for record in run.steps()]
        assert steps == list(range(1, len(steps) + 1))
        assert len(steps) >= 20
    DatapointLog.open(folder, {"seed": 1}).close()


def test_a_folder_without_a_log_or_with_a_damaged_one_is_refused(folder: Path) -> None:
    with pytest.raises(BadInput, match=r"run\.json is missing"):
        RunRecord(folder)
    folder.mkdir(parents=True)
    for content in ("{", "[]", '{"format_version": 9, "attempts": []}'):
        (folder / "run.json").write_text(content)
        with pytest.raises(BadInput, match=r"run\.json is"):
            RunRecord(folder)
