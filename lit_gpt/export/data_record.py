"""The record of a training that goes with an exported model: what every step saw, the settings, and the report.

    training_record/datapoints/   the datapoint log up to this checkpoint: its bytes have the hash that the checkpoint,
                                  and so the model card, names. `scripts/datapoints.py verify --run_dir
                                  training_record --data_dir DIR` compares it with the token stores, whose ids it holds
    training_record/steps.parquet         step, first row, rows, targets and digest of each step of the run's history
    training_record/documents.parquet     on request: every part of every document that a step saw
    training_record/settings.yaml, resolved.json, metrics.csv, report.html

Invariants: no path of the machine that trained, no host and no environment variable is in it. A log that contradicts
the checkpoint is left out, with a warning: an export does not fail for its record.
Costs: some 100 bytes a step, and a second for 200,000 steps; documents.parquet reads the rows of the whole run.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
import yaml

from lit_gpt.checkpoint.record import Checkpoint
from lit_gpt.cli import BadInput
from lit_gpt.datapoints.attempts import Attempt, Mark, read_attempts, write_attempts
from lit_gpt.datapoints.log import FOLDER, STEPS_FILE
from lit_gpt.datapoints.query import Replay
from lit_gpt.datapoints.run_folder import PATHS
from lit_gpt.datapoints.run_record import RunRecord
from lit_gpt.datapoints.tables import write_documents
from lit_gpt.report.run_page import run_page
from lit_gpt.report.run_view import RECORD, RunView, read_run

log = logging.getLogger(__name__)

_DETAILS = ("world_size", "micro_batch_size", "left_out", "data_from_step", "changed_settings", "lost")
"""What an attempt's details say beside paths."""
_CHUNK_BYTES = 1 << 20
_STEPS = 1 << 16
"""Rows of a row group of steps.parquet."""


def write_record(folder: Path, checkpoint: Checkpoint, *, documents: bool = False) -> bool:
    """Write `folder`/training_record; False, which is logged, if the run has no log that agrees with the checkpoint.

    documents: also documents.parquet. BadInput if the data that it needs is not at hand.
    """
    run_dir, saved = checkpoint.path.parent, checkpoint.facts.get("datapoint_log")
    if saved is None or not (run_dir / FOLDER).is_dir():
        log.info("%s: the run has no datapoint log here, so no record goes with it", checkpoint.path.name)
        return False
    try:
        attempts = read_attempts(run_dir / FOLDER)
        mark = Mark(**saved)
        if mark.attempt >= len(attempts):
            raise BadInput(f"the datapoint log does not have the start {mark.attempt} of the checkpoint")
        record = folder / RECORD
        (record / FOLDER).mkdir(parents=True)
        _copy_log(run_dir / FOLDER / STEPS_FILE, record / FOLDER / STEPS_FILE, mark)
    except (BadInput, OSError) as error:
        shutil.rmtree(folder / RECORD, ignore_errors=True)
        log.warning("%s: exported without a record of its data: %s", checkpoint.path.name, error)
        return False
    write_attempts(record / FOLDER, [_public(attempt) for attempt in attempts[: mark.attempt + 1]])
    _write_steps(record)
    view = public_view(read_run(run_dir))
    (record / "settings.yaml").write_text(yaml.safe_dump(view.settings, sort_keys=False), encoding="utf-8")
    (record / "resolved.json").write_text(json.dumps(view.resolved, indent=1), encoding="utf-8")
    _copy_metrics(run_dir / "metrics.csv", record / "metrics.csv", checkpoint.step)
    run_page([view]).write(record / "report.html")
    if documents:
        write_documents(Replay(run_dir), record / "documents.parquet", last_step=checkpoint.step)
    return True


def public_view(view: RunView) -> RunView:
    """What a run says, without paths, hosts and the command that began it."""
    return replace(
        view,
        folder=Path(view.name),
        settings={name: value for name, value in view.settings.items() if name not in (*PATHS, "resume")},
        environment={name: value for name, value in view.environment.items() if name != "command"},
        attempts=[_public(attempt) for attempt in view.attempts],
        beats=[],
        problems=[],
    )


def _public(attempt: Attempt) -> Attempt:
    details: dict[str, Any] = {name: attempt.details[name] for name in _DETAILS if name in attempt.details}
    changed = details.get("changed_settings")
    if isinstance(changed, Mapping):
        details["changed_settings"] = {name: pair for name, pair in changed.items() if name not in PATHS}
    for name in ("train_data_dir", "resumed_from"):
        details[name] = _last_names(attempt.details.get(name))
    return attempt._replace(details=details)


def _last_names(path: object) -> object:
    if isinstance(path, list):
        return [_last_names(inner) for inner in path]
    return "/".join(PurePath(path).parts[-2:]).strip("/") if isinstance(path, str) else None


def _copy_log(source: Path, destination: Path, mark: Mark) -> None:
    """The first mark.bytes bytes; BadInput if they are not those that the checkpoint knows."""
    running, left = xxhash.xxh3_64(), mark.bytes
    with source.open("rb") as file, destination.open("wb") as copy:
        while left and (chunk := file.read(min(left, _CHUNK_BYTES))):
            running.update(chunk)
            copy.write(chunk)
            left -= len(chunk)
    if left or running.hexdigest() != mark.xxh3:
        raise BadInput(f"{source} does not begin with the {mark.bytes} bytes that the checkpoint was saved with")


def _write_steps(record: Path) -> None:
    numbers = [(name, pa.int64()) for name in ("step", "first_slot", "rows", "targets")]
    schema = pa.schema([*numbers, ("digest", pa.string())])
    with RunRecord(record / FOLDER) as run, pq.ParquetWriter(record / "steps.parquet", schema) as writer:
        held: list[tuple[Any, ...]] = []
        for step in run.steps():
            held.append((step.step, step.first_slot, step.rows, step.targets, f"{step.digest:016x}"))
            if len(held) == _STEPS:
                _write_group(writer, schema, held)
        _write_group(writer, schema, held)


def _write_group(writer: pq.ParquetWriter, schema: pa.Schema, held: list[tuple[Any, ...]]) -> None:
    columns = zip(*held, strict=True) if held else [()] * len(schema)
    writer.write_table(pa.table([list(column) for column in columns], schema=schema))
    held.clear()


def _copy_metrics(source: Path, destination: Path, last_step: int) -> None:
    if not source.is_file():
        return
    with source.open(encoding="utf-8", errors="replace") as file, destination.open("w", encoding="utf-8") as copy:
        copy.write(file.readline())
        for line in file:
            step = line.partition(",")[0]
            if step.isdecimal() and int(step) <= last_step and line.endswith("\n"):
                copy.write(line)
