"""Whether an exported tokenizer begins a text with BOS: as the training did, wherever its data is now."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from lit_gpt.cli import BadInput
from lit_gpt.data.token_store import MANIFEST, TokenStore, write_store
from lit_gpt.data.tokenizer import Tokenizer
from lit_gpt.export.parity import GERMAN_TEXT
from lit_gpt.train.run_inputs import open_inputs
from lit_gpt.train.settings import Settings
from scripts import convert_hf_checkpoint
from tests.export.test_convert import changed_run, export, refused_export
from tests.support.training import SMALL


def with_bos(run_dir: Path, tokenizer_path: Path, folder: Path, **facts: object) -> Path:
    """A run folder whose checkpoint, at step 9, was trained on folder/data, whose documents begin with BOS."""
    tokenizer = Tokenizer.from_folder(tokenizer_path)
    write_store(
        folder / "data", [("a", [0, *tokenizer.encode(GERMAN_TEXT), 1])],
        tokenizer_fingerprint=tokenizer.fingerprint, vocab_size=300, bos_id=0, eos_id=1,
    )  # fmt: skip
    manifest = folder / "data" / MANIFEST
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"settings": {"add_bos": True}}))
    store = TokenStore.open(folder / "data")
    where = {"train_data_dir": [str(store.path)], "dataset_id": [store.dataset_id]}
    return changed_run(run_dir, folder, {}, **where | facts)


def first_ids(folder: Path) -> list[int]:
    """What transformers begins each text with: [0] is BOS."""
    return AutoTokenizer.from_pretrained(folder)("").input_ids


@pytest.mark.parametrize("recorded", [True, False])
def test_bos_is_what_the_checkpoint_says(run_dir: Path, tokenizer_path: Path, tmp_path: Path, recorded: bool) -> None:
    """The data set has moved, and its place is taken by one that says the opposite."""
    run = with_bos(run_dir, tokenizer_path, tmp_path / "other", add_bos=recorded)
    export(run, tmp_path / "hf", step=9)
    assert first_ids(tmp_path / "hf") == [0] * recorded
    refused_export(run, tmp_path / "other", "with BOS", "--add_bos", "no" if recorded else "yes", step=9)


def test_an_older_checkpoint_asks_its_data_set_and_says_so(
    run_dir: Path, tokenizer_path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = with_bos(run_dir, tokenizer_path, tmp_path)
    export(run, tmp_path / "found", step=9)
    assert first_ids(tmp_path / "found") == [0]
    assert "asked its data set" in caplog.text
    other = with_bos(run_dir, tokenizer_path, tmp_path / "changed_data", dataset_id=["another"])
    export(other, tmp_path / "lost", step=9)
    assert first_ids(tmp_path / "lost") == []
    assert "If they do, export again with --add_bos yes" in caplog.text
    export(other, tmp_path / "told", "--add_bos", "yes", step=9)
    assert first_ids(tmp_path / "told") == [0]


def test_an_imported_model_keeps_its_bos(run_dir: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    export(with_bos(run_dir, tokenizer_path, tmp_path, add_bos=True), tmp_path / "hf", step=9)
    again = tmp_path / "run" / "iter-00000000-ckpt.pth"
    convert_hf_checkpoint.main(["--checkpoint_dir", str(tmp_path / "hf"), "--destination_path", str(again)])
    export(tmp_path / "run", tmp_path / "hf2", step=0)
    assert first_ids(tmp_path / "hf2") == [0]


def test_data_with_bos_is_not_mixed_with_data_without(tokenizer_path: Path, tmp_path: Path) -> None:
    fingerprint = Tokenizer.from_folder(tokenizer_path).fingerprint
    for name, add_bos in (("with", True), ("without", False)):
        write_store(
            tmp_path / name, [("a", [0, 5, 1])], tokenizer_fingerprint=fingerprint, vocab_size=300, bos_id=0, eos_id=1
        )
        manifest = tmp_path / name / MANIFEST
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"settings": {"add_bos": add_bos}}))
    paths = {"train_data_dir": str(tmp_path / "without"), "val_data_dir": str(tmp_path / "with")}
    settings = Settings(**SMALL, **paths, out_dir=str(tmp_path / "run"))
    with pytest.raises(
        BadInput, match=r"begin with BOS in .*/with, but not in .*/without: prepare both with --add_bos"
    ):
        open_inputs(settings)
