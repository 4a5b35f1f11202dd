"""The record that goes with a model: it can be verified by who has the data, and holds nothing of the machine."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import xxhash
import yaml

from lit_gpt.checkpoint.record import checkpoint_name, described
from lit_gpt.export.data_record import write_record
from lit_gpt.export.model_card import Card, write_card
from lit_gpt.export.parity import Parity
from tests.support.programs import ROOT, run_program
from tests.support.run_folder import killed_and_resumed
from tests.support.training import seen_rows

STEP = 8
"""A checkpoint in the middle of the run: the record goes as far as it."""


@pytest.fixture(scope="module")
def model(german_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the record, and the card, of the run's second checkpoint."""
    folder = tmp_path_factory.mktemp("model")
    checkpoint = described(german_run / checkpoint_name(STEP))
    assert write_record(folder, checkpoint, documents=True)
    write_card(folder, checkpoint, Card("unknown", "float32", Parity(0.0, 1.0, 1.0)))
    return folder


def verify(record: Path, data: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "scripts/datapoints.py", "verify", "--run_dir", record, "--data_dir", data]
    return run_program(command)


@pytest.mark.slow
def test_who_has_the_data_can_verify_it(model: Path, german_run: Path, tmp_path: Path) -> None:
    record = tmp_path / "training_record"
    shutil.copytree(model / "training_record", record)
    data = german_run.parent / "data" / "train"
    done = verify(record, data)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"0 contradictions up to step {STEP}" in done.stdout
    steps = record / "datapoints" / "steps.jsonl"
    digest = json.loads(steps.read_text().splitlines()[2])["digest"]
    steps.write_text(steps.read_text().replace(digest, "0" * 16))
    assert verify(record, data).returncode == 1


def test_the_card_names_the_hash_of_the_log(model: Path) -> None:
    raw = (model / "training_record/datapoints/steps.jsonl").read_bytes()
    card = (model / "README.md").read_text(encoding="utf-8")
    assert f"`{xxhash.xxh3_64_hexdigest(raw)}`" in card
    assert f"{len(raw):,} bytes" in card
    assert "(training_record/report.html)" in card
    assert "verify --run_dir training_record --data_dir DATA_SET" in card


def test_the_tables_are_those_of_the_steps(model: Path, german_run: Path) -> None:
    table = pq.read_table(model / "training_record/steps.parquet").to_pylist()
    seen = seen_rows(german_run)
    assert [row["step"] for row in table] == list(range(1, STEP + 1))
    assert {row["step"]: (row["first_slot"], row["rows"], row["targets"], row["digest"]) for row in table} == {
        step: seen[step] for step in range(1, STEP + 1)
    }
    documents = pq.read_table(model / "training_record/documents.parquet")
    assert set(documents.column("step").to_pylist()) == set(range(1, STEP + 1))
    metrics = (model / "training_record/metrics.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in metrics] == ["step", *map(str, range(1, STEP + 1))]


def test_nothing_of_the_machine_is_published(model: Path, german_run: Path) -> None:
    """No folder of the run or of its data, not even inside the report."""
    record = model / "training_record"
    settings = yaml.safe_load((record / "settings.yaml").read_text())
    assert settings["seed"] == 3407
    assert "train_data_dir" not in settings
    secrets = [str(german_run.parent).encode(), str(Path.home()).encode() + b"/", b"tinyllama_fabric.py"]
    for path in record.rglob("*"):
        if path.is_file():
            assert [secret for secret in secrets if secret in path.read_bytes()] == [], path


def test_a_log_that_contradicts_the_checkpoint_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = killed_and_resumed(tmp_path / "run")
    steps = run / "datapoints" / "steps.jsonl"
    steps.write_bytes(steps.read_bytes().replace(b'"rows":8', b'"rows":9', 1))
    assert not write_record(tmp_path / "model", described(run / checkpoint_name(40)))
    assert "exported without a record of its data" in caplog.text
    assert not (tmp_path / "model" / "training_record").exists()
    shutil.rmtree(run / "datapoints")
    assert not write_record(tmp_path / "model", described(run / checkpoint_name(40)))
