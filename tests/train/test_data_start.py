"""A checkpoint goes on only with its own data, wherever it is taken; --new_data begins other data at their start."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from lit_gpt.checkpoint.checkpoint import Checkpoint
from lit_gpt.cli import BadInput
from lit_gpt.data.token_store import write_store
from lit_gpt.datapoints.run_record import RunRecord
from lit_gpt.datapoints.settings import DatapointSettings
from lit_gpt.train.data_start import data_start
from tests.support.programs import ROOT, run_program
from tests.support.training import EOS, VOCABULARY, command, documents, metrics, seen_rows, train

FACTS = {
    "datasets": ["a"], "mixture": [4096], "seed": 1, "block_size": 64, "packing": "window", "packing_version": 1,
    "order_version": 1, "pool_shards": 64, "global_batch_size": 8, "cross_document_attention": False,
}  # fmt: skip
OTHER = {
    "datasets": ["b"], "mixture": [2048, 2048], "seed": 2, "block_size": 32, "packing": "pad", "packing_version": 2,
    "order_version": 2, "pool_shards": 32, "global_batch_size": 4, "cross_document_attention": True,
}  # fmt: skip


def saved(**facts: Any) -> Checkpoint:
    return Checkpoint(Path("x"), {"step": 5, "slot": 40, "slot_facts": FACTS, **facts})


@pytest.mark.parametrize("name", FACTS)
def test_each_fact_is_compared(name: str) -> None:
    now = {**FACTS, name: OTHER[name]}
    changed = {name: [FACTS[name], OTHER[name]]}
    with pytest.raises(BadInput, match=f"{name} was .* and is .*--new_data true .*--allow_changed_data true"):
        data_start(saved(), now, "t", DatapointSettings())
    assert data_start(saved(), now, "t", DatapointSettings(new_data=True)) == (0, 5, True, changed)
    assert data_start(saved(), now, "t", DatapointSettings(allow_changed_data=True)) == (40, 0, False, changed)


def test_new_data_goes_on_where_nothing_has_changed() -> None:
    """A job that is requeued with the flag does not begin again; the step at which the data began stays known."""
    begun = saved(data_from_step=3)
    for settings in (DatapointSettings(), DatapointSettings(new_data=True), DatapointSettings(allow_changed_data=True)):
        assert data_start(begun, FACTS, "t", settings) == (40, 3, False, {})


def test_a_checkpoint_of_before_tells_its_facts_by_its_settings() -> None:
    old: dict[str, Any] = {"step": 5, "slot": 40, "dataset_id": ["a"], "model": {"block_size": 64}}
    old |= {"datapoint_log": {"attempt": 0, "step": 5, "bytes": 9, "xxh3": "0"}}
    old["settings"] = {name: FACTS[name] for name in ("seed", "packing", "global_batch_size")}
    start = Checkpoint(Path("/nowhere/x"), old)
    assert data_start(start, FACTS, "t", DatapointSettings()) == (40, 0, False, {})
    for name in ("datasets", "seed", "packing", "global_batch_size", "block_size"):
        with pytest.raises(BadInput, match=f"{name} was"):
            data_start(start, {**FACTS, name: OTHER[name]}, "t", DatapointSettings())


def test_an_imported_model_just_begins() -> None:
    imported = Checkpoint(Path("x"), {"step": 0, "slot": 0, "settings": {}, "tokenizer_fingerprint": "other"})
    assert data_start(imported, FACTS, "t", DatapointSettings()) == (0, 0, False, {})


def test_another_tokenizer_is_no_continued_pretraining() -> None:
    with pytest.raises(BadInput, match="Prepare the data with the model's tokenizer"):
        data_start(saved(tokenizer_fingerprint="u"), OTHER, "t", DatapointSettings(new_data=True))


def other_store(folder: Path) -> Path:
    """80 documents; in the tokenizer and the vocabulary of the shared store."""
    write_store(
        folder, documents(80, 9), tokenizer_fingerprint="test", vocab_size=VOCABULARY, bos_id=1, eos_id=EOS,
        shard_tokens=6000,
    )  # fmt: skip
    return folder


def datapoints(run: Path, *query: str) -> subprocess.CompletedProcess[str]:
    return run_program([sys.executable, ROOT / "scripts/datapoints.py", *query, "--run_dir", run])


@pytest.mark.slow
@pytest.mark.long
def test_continued_pretraining(store: Path, tmp_path: Path) -> None:
    """Four steps, then eight on other data from its slot 0 on; taken up again with the flag still given; the record
    verifies over both, and finds a document of each."""
    run, other = tmp_path / "run", other_store(tmp_path / "other")
    train(store, run, max_steps=4, keep_last_checkpoints=0)
    begun = dict(train_data_dir=other, resume="auto", keep_last_checkpoints=0)
    for out in (run, tmp_path / "elsewhere"):
        resume = "auto" if out == run else run / "iter-00000004-ckpt.pth"
        refused = run_program(command(store, out, **{**begun, "resume": resume}))
        assert refused.returncode == 2
        assert "the data has changed since" in refused.stderr
        assert "datasets was" in refused.stderr
    train(store, run, max_steps=8, new_data="true", **begun)
    train(store, run, max_steps=12, new_data="true", **begun)
    assert [first for first, *_ in seen_rows(run).values()] == [0, 8, 16, 24, 0, 8, 16, 24, 32, 40, 48, 56]
    attempts = json.loads((run / "datapoints" / "run.json").read_text())["attempts"]
    assert [attempt["details"]["data_from_step"] for attempt in attempts] == [0, 4, 4]
    changed = attempts[1]["details"]["changed_settings"]
    assert changed["train_data_dir"] == [str(store / "train"), str(other)]
    assert changed["max_steps"] == [4, 8]
    verified = datapoints(run, "verify", "--json")
    assert json.loads(verified.stdout) == {"steps_to": 12, "rows": 96, "contradictions": 0}
    for step in (2, 10):
        document = json.loads(datapoints(run, "step", str(step), "--json").stdout.splitlines()[0])["document"]
        found = [json.loads(line) for line in datapoints(run, "doc", document, "--json").stdout.splitlines()]
        assert step in {part["step"] for part in found}


@pytest.mark.slow
def test_a_start_that_saved_nothing_binds_nothing(store: Path, tmp_path: Path) -> None:
    """Killed before its first save, here as its checkpoint is taken away: then other data, without a flag."""
    run, other = tmp_path / "run", other_store(tmp_path / "other")
    train(store, run, max_steps=4)
    for path in run.glob("iter-*"):
        shutil.rmtree(path)
    train(store, run, max_steps=4, train_data_dir=other, seed=5, resume="auto")
    with RunRecord(run / "datapoints") as record:
        assert [step.first_slot for step in record.steps()] == [0, 8, 16, 24]
        assert len(record.lineage) == 1


@pytest.mark.slow
def test_changed_settings_run_and_are_recorded(store: Path, tmp_path: Path) -> None:
    """--weight_decay 100 at a resume: other losses; settings.yaml has what runs, with absolute paths."""
    train(store, tmp_path / "run", max_steps=4, keep_last_checkpoints=0)
    losses = {}
    for decay in (0.1, 100.0):
        out = tmp_path / str(decay)
        train(store, out, max_steps=8, weight_decay=decay, resume=tmp_path / "run" / "iter-00000004-ckpt.pth")
        losses[decay] = [line["loss"] for line in metrics(out)]
        details = json.loads((out / "datapoints" / "run.json").read_text())["attempts"][0]["details"]
        assert details["changed_settings"].get("weight_decay") == ([0.1, 100.0] if decay == 100.0 else None)
        settings = yaml.safe_load((out / "settings.yaml").read_text())
        assert settings["weight_decay"] == decay
        assert Path(settings["train_data_dir"]).is_absolute()
    assert losses[0.1][0] == losses[100.0][0]  # the loss before the first update
    assert all(one != two for one, two in zip(losses[0.1][1:], losses[100.0][1:], strict=True))
