"""The record of attempts with any bit flipped, cut or gone: a start goes on, and never by a false record."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import xxhash

from lit_gpt.checkpoint.history import left_behind
from lit_gpt.cli import BadInput
from lit_gpt.datapoints.attempts import (
    COPY_FILE,
    RUN_FILE,
    Attempt,
    Mark,
    is_in_lineage,
    read_attempts,
    write_attempts,
)
from lit_gpt.datapoints.log import FOLDER, DatapointLog
from lit_gpt.datapoints.run_record import RunRecord

FACTS = {"seed": 1, "datasets": ["ab"]}


def written(run_dir: Path) -> tuple[list[Attempt], Mark]:
    """Steps 1 to 6; then back to 4, and 5 to 6 again. Also the mark of step 4."""
    folder = run_dir / FOLDER
    with DatapointLog.open(folder, FACTS, details={"world_size": 2}) as log:
        for step in range(1, 5):
            log.append(step, 8 * (step - 1), 8, 60, digest=step)
        mark = log.flush_and_fsync()
        for step in (5, 6):
            log.append(step, 8 * (step - 1), 8, 60, digest=step)
    with DatapointLog.open(
        folder, FACTS, parent=mark, details={"changed_settings": {"learning_rate": [1e-3, 2.5]}}
    ) as log:
        for step in (5, 6):
            log.append(step, 8 * (step - 1), 8, 60, digest=10 + step)
    return read_attempts(folder), mark


@pytest.mark.parametrize("every", [37, pytest.param(1, marks=pytest.mark.long)])
@pytest.mark.parametrize("name", [RUN_FILE, COPY_FILE])
def test_a_flipped_bit_changes_nothing(tmp_path: Path, name: str, every: int) -> None:
    attempts, mark = written(tmp_path)
    path = tmp_path / FOLDER / name
    whole = path.read_bytes()
    for bit in range(0, 8 * len(whole), every):
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        assert read_attempts(tmp_path / FOLDER) == attempts
        assert left_behind(tmp_path) == []
    path.write_bytes(whole[: len(whole) // 2] + bytes(len(whole) // 2))
    DatapointLog.open(tmp_path / FOLDER, FACTS, parent=mark).close()
    assert path.read_bytes() == (tmp_path / FOLDER / RUN_FILE).read_bytes()
    assert read_attempts(tmp_path / FOLDER)[:2] == attempts
    assert len(read_attempts(tmp_path / FOLDER)) == 3


def test_a_run_of_many_starts_stays_readable(tmp_path: Path) -> None:
    """As many bytes as 2,000 starts with 100 sources each, which are more than are read of JSON from elsewhere."""
    sources = [f"/scratch/project/data/source-{number:03d}/train" for number in range(100)]
    details = {"train_data_dir": sources, "dataset_id": ["0" * 64] * 100}
    attempts = [Attempt(number, None, False, 0, "", FACTS, details) for number in range(2000)]
    assert write_attempts(tmp_path, attempts)
    assert (tmp_path / RUN_FILE).stat().st_size > 20_000_000
    assert read_attempts(tmp_path) == attempts


def test_a_missing_file_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    attempts, _ = written(tmp_path)
    (tmp_path / FOLDER / RUN_FILE).unlink()
    assert read_attempts(tmp_path / FOLDER) == attempts
    assert f"{RUN_FILE} is missing: {tmp_path / FOLDER / COPY_FILE} replaces it" in caplog.text


@pytest.mark.parametrize("every", [41, pytest.param(1, marks=pytest.mark.long)])
def test_a_file_of_an_earlier_version_with_a_flipped_bit_stops_no_run(tmp_path: Path, every: int) -> None:
    """No hash and no copy: what does not parse is set aside; a start goes on, under a number that no other has."""
    _, mark = written(tmp_path / "whole")
    path = tmp_path / "whole" / FOLDER / RUN_FILE
    content = json.loads(path.read_bytes())
    del content["xxh3"]
    whole = json.dumps(content, indent=1).encode()
    (tmp_path / "whole" / FOLDER / COPY_FILE).unlink()
    aside = 0
    for bit in range(0, 8 * len(whole), every):
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        folder = tmp_path / "run" / FOLDER
        shutil.copytree(path.parent, folder)
        with DatapointLog.open(folder, FACTS, parent=mark) as log:
            log.append(5, 32, 8, 60, digest=25)
            assert log.attempt == 2
        with RunRecord(folder) as run:
            assert run.last() is not None
        if found := list(folder.glob("run.json.damaged-*")):
            aside += 1
            assert found[0].read_bytes() == changed
            assert is_in_lineage(mark, read_attempts(folder))
            assert not is_in_lineage(Mark(0, 6, 10, "0" * 16), read_attempts(folder)), "of the branch that was left"
        shutil.rmtree(tmp_path / "run")
    assert aside > 0


def test_a_log_of_a_later_version_is_no_damage(tmp_path: Path) -> None:
    """Its hash is right, so it says what its writer meant."""
    written(tmp_path)
    content = {"format_version": 2, "steps": "elsewhere"}
    content["xxh3"] = xxhash.xxh3_64_hexdigest(json.dumps(content, sort_keys=True).encode())
    for name in (RUN_FILE, COPY_FILE):
        (tmp_path / FOLDER / name).write_text(json.dumps(content))
    with pytest.raises(BadInput, match="is of format 2, this program reads 1"):
        read_attempts(tmp_path / FOLDER)
