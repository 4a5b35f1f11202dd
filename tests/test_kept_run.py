"""Files of version 0.1.0 still work: stores, records, checkpoints and exports outlive the code that wrote them.

tests/support/kept.py says how they were made. A change of the code must not need a change of the archive.
"""

from __future__ import annotations

import csv
import json
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from lit_gpt.checkpoint.checkpoint import model_tensors, verified
from scripts import datapoints, prepare_data
from tests.support.kept import RECIPE
from tests.support.programs import ROOT, run_program
from tests.support.training import full_state, seen_rows

KEPT = ROOT / "tests" / "golden" / "kept_run.tar.xz"
TRAINING = "pretrain/tinyllama_fabric.py"


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    with tarfile.open(KEPT) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def run(kept: Path, program: str, **flags: object) -> None:
    """A program of today, with the kept run's folder as working directory."""
    words = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    done = run_program([sys.executable, ROOT / "tests/support/kept.py", ROOT / program, *words], cwd=kept)
    assert done.returncode == 0, done.stderr


def losses(folder: Path) -> dict[int, float]:
    with (folder / "metrics.csv").open(newline="") as file:
        return {int(row["step"]): float(row["loss"]) for row in csv.DictReader(file)}


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_store_has_the_same_bytes_today(kept: Path) -> None:
    prepare_data.main(
        ["--source", str(kept / "text.jsonl"), "--tokenizer_path", str(kept / "tokenizer"), "--destination_path",
         str(kept / "again"), "--val_fraction", "0.1", "--workers", "1", "--shard_tokens", "1500"]
    )  # fmt: skip
    assert not prepare_data.main(["verify", str(kept / "data")])
    for split in ("train", "val"):
        assert files(kept / "again" / split) == files(kept / "data" / split)


@pytest.mark.slow
def test_training_goes_on_from_the_checkpoints(kept: Path) -> None:
    """From step 8, with the losses and the rows that followed then; from step 4, of two ranks; and past the end."""
    run(kept, TRAINING, **RECIPE, out_dir="again", resume="run/iter-00000008-ckpt.pth")
    before, after = losses(kept / "run"), losses(kept / "again")
    assert list(after) == [9, 10, 11, 12]
    assert after == pytest.approx({step: before[step] for step in after}, rel=1e-6)
    rows = seen_rows(kept / "run")
    assert seen_rows(kept / "again") == {step: rows[step] for step in after}
    for name, tensor in full_state(kept / "again", 12).items():
        assert tensor.allclose(full_state(kept / "run", 12)[name], rtol=1e-4, atol=1e-6), name

    run(kept, TRAINING, **RECIPE, out_dir="sharded", resume="auto")
    assert losses(kept / "sharded") == pytest.approx(before, rel=1e-4)

    run(kept, TRAINING, **RECIPE | {"max_steps": 16}, out_dir="run", resume="auto")
    assert list(losses(kept / "run")) == list(range(1, 17))


def test_the_record_still_answers(kept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What the program of then said: 48 rows without a contradiction, and what step 10 saw."""
    where = ["--run_dir", str(kept / "run"), "--data_dir", str(kept / "data" / "train"), "--json"]
    assert datapoints.main(["verify", *where]) == 0
    assert json.loads(capsys.readouterr().out) == {"steps_to": 12, "rows": 48, "contradictions": 0}
    assert datapoints.main(["step", "10", *where]) == 0
    seen = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(part["slot"], part["document"], part["start"], part["length"]) for part in seen] == [
        (36, "generated-3407#9", 256, 64), (37, "generated-3407#20", 448, 64), (38, "generated-3407#12", 275, 64),
        (39, "generated-3407#22", 219, 62),
    ]  # fmt: skip


@pytest.mark.slow
def test_the_export_has_the_same_bytes_today(kept: Path) -> None:
    run(
        kept, "scripts/convert_lit_checkpoint.py", checkpoint="run/iter-00000012-ckpt.pth", tokenizer_path="tokenizer",
        destination_path="again",
    )  # fmt: skip
    before, after = files(kept / "model"), files(kept / "again")
    for name, added in {  # what exports of then did not say
        "config.json": {"pad_token_id": 1},
        "tokenizer_config.json": {"pad_token": "</s>", "padding_side": "left"},
    }.items():
        assert json.loads(after.pop(name)) == json.loads(before.pop(name)) | added
    assert {name: after[name] for name in before} == before


@pytest.mark.slow
def test_an_export_of_then_is_imported(kept: Path) -> None:
    """Without the optimizer's state, in the export's bf16."""
    run(kept, "scripts/convert_hf_checkpoint.py", checkpoint_dir="model", destination_path="new/iter-00000000-ckpt.pth")
    imported, trained = (
        dict(model_tensors(verified(kept / name)))
        for name in ("new/iter-00000000-ckpt.pth", "run/iter-00000012-ckpt.pth")
    )
    assert imported.keys() == trained.keys()
    assert all(torch.equal(imported[name], trained[name].bfloat16().float()) for name in trained)
