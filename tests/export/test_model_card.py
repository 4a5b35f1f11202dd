"""The model card: front matter that Hugging Face parses, the run's figures, no secret and no path of the machine."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from lit_gpt.checkpoint.record import Checkpoint
from lit_gpt.config import Config
from lit_gpt.data.token_store import TokenStore, write_store
from lit_gpt.datapoints.run_folder import read_metrics
from lit_gpt.export.model_card import Card, tells_of, write_card
from lit_gpt.export.parity import Parity
from lit_gpt.train.settings import Settings, TrackerSettings
from lit_gpt.train.trackers import Trackers

CARD = Card("apache-2.0", "bfloat16", Parity(3e-7, 12.5, 256))


def write_manifest(path: Path, state_xxh3: str) -> None:
    files = {"run.json": "00000000deadbeef", "state.pth": state_xxh3}
    (path / "MANIFEST.json").write_text(json.dumps({name: {"bytes": 5, "xxh3": xxh3} for name, xxh3 in files.items()}))


def published(path: Path, facts: dict[str, Any]) -> Checkpoint:
    """A checkpoint with a manifest but without the files that it names: a card does not need them."""
    path.mkdir(parents=True)
    write_manifest(path, "0123456789abcdef")
    return Checkpoint(path, facts)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    """The checkpoint of step 20 of a run with metrics to step 30 and its data on this machine."""
    write_store(
        tmp_path / "train", [("a", [5, 6, 1]), ("b", [7, 1])],
        tokenizer_fingerprint="fingerprint", vocab_size=300, bos_id=0, eos_id=1,
    )  # fmt: skip
    run = tmp_path / "run"
    run.mkdir()
    trackers = Trackers(run, 0, TrackerSettings(tensorboard=False), {})
    for step, loss in ((10, 5.0), (20, 4.0), (30, 3.0)):
        trackers.log({"step": step, "loss": loss, "val_loss": loss + 0.5, "val_bits_per_byte": loss / 4})
    trackers.close()
    facts = {
        "step": 20, "slot": 160, "tokens": 1_000_000, "model": asdict(Config.from_name("LLaMmlein_120M")),
        "settings": asdict(Settings(train_data_dir="/home/someone/train", learning_rate=3e-4)),
        "dataset_id": [TokenStore.open(tmp_path / "train").dataset_id], "train_data_dir": [str(tmp_path / "train")],
        "tokenizer_fingerprint": "fingerprint", "world_size": 4,
        "datapoint_log": {"attempt": 2, "step": 20, "bytes": 1234, "xxh3": "abcd"},
        "environment": {"git_commit": "c0ffee", "packages": {"torch": "2.13.0"}, "command": ["x", "--secret"]},
    }  # fmt: skip
    return published(run / "iter-00000020-ckpt.pth", facts)


def test_it_tells_the_run(checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_thisIsSecret")
    write_card(tmp_path, checkpoint, CARD)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.to_dict() == {
        "language": "de", "license": "apache-2.0", "library_name": "transformers",
        "pipeline_tag": "text-generation", "tags": ["llama", "pretrained"],
    }  # fmt: skip
    for line in (
        "# LLaMmlein_120M, step 20",
        "| parameters | 124,766,976 |",
        "| vocabulary | 32,010 ids, padded to 32,064 |",
        "| documents, tokens | 2, 5 |",
        "| tokens trained | 1,000,000 |",
        "| training loss | 4.0000 |",
        "| validation loss | 4.5000 |",
        "| validation bits per byte | 1.0000 |",
        "| processes | 4 |",
        "| energy | not recorded |",
        "| code | `c0ffee` |",
        "| `learning_rate` | `0.0003` |",
    ):
        assert line in card.content.splitlines(), line
    assert checkpoint.facts["dataset_id"][0] in card.content
    assert "attempt 2, 1,234 bytes, xxh3 `abcd`" in card.content
    assert "largest difference 3.0e-07" in card.content
    assert f"xxh3 `{checkpoint.state_xxh3}`" in card.content
    assert tells_of(tmp_path, checkpoint)
    write_manifest(checkpoint.path, "fedcba9876543210")
    assert not tells_of(tmp_path, checkpoint)
    assert not tells_of(checkpoint.path, checkpoint), "no card is there"
    for hidden in ("hf_thisIsSecret", "--secret", "/home/someone", str(tmp_path)):
        assert hidden not in card.content
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("host_j", "told"),
    [
        (None, "0.4 J a token: GPUs 0.1 kWh, hosts not recorded, recorded for 90% of the tokens"),
        (90_000.0, "0.6 J a token: GPUs 0.1 kWh, hosts 0.05 kWh, recorded for 90% of the tokens"),
    ],
)
def test_it_tells_the_energy(checkpoint: Checkpoint, tmp_path: Path, host_j: float | None, told: str) -> None:
    """Of steps 10 and 20, 450,000 tokens each; 1 kWh is 3.6 MJ. Step 30 is not of this checkpoint."""
    trackers = Trackers(tmp_path / "run", 0, TrackerSettings(tensorboard=False), {})
    for step in (10, 20, 30):
        joules = dict(gpu_energy_j=180_000.0, host_energy_j=host_j)
        trackers.log({"step": step, "loss": 4.0, **joules, "joules_per_token": (180_000 + (host_j or 0)) / 450_000})
    trackers.close()
    write_card(tmp_path, checkpoint, CARD)
    assert f"| energy | {told} |" in (tmp_path / "README.md").read_text().splitlines()


def test_it_tells_of_an_average(checkpoint: Checkpoint, tmp_path: Path) -> None:
    parts = [{"step": step, "weight": weight, "state_xxh3": "ab" * 8} for step, weight in ((10, 0.25), (20, 0.75))]
    average = {"half_life_steps": 1500.0, "checkpoints": parts}
    write_card(tmp_path, Checkpoint(checkpoint.path, {**checkpoint.facts, "average": average}), CARD)
    lines = (tmp_path / "README.md").read_text().splitlines()
    how = "half as much for every 1500 steps before the newest"
    states = ", ".join(f"step {step} (xxh3 `{'ab' * 8}`)" for step in (10, 20))
    assert f"| weights | the average of 2 checkpoints, {how}: {states} |" in lines
    assert "| validation loss, of the newest weights, not of the average | 4.5000 |" in lines


def test_what_is_not_at_hand_is_unknown(checkpoint: Checkpoint, tmp_path: Path) -> None:
    facts = {**checkpoint.facts, "train_data_dir": str(tmp_path / "absent")}
    bare = published(tmp_path / "elsewhere" / "iter-00000020-ckpt.pth", facts)
    write_card(tmp_path, bare, CARD)
    text = (tmp_path / "README.md").read_text()
    assert "unknown: the data set was not at hand" in text
    assert "training loss" not in text
    assert not (tmp_path / "loss.png").exists()
    write_card(tmp_path, Checkpoint(checkpoint.path, {**checkpoint.facts, "dataset_id": ["other"]}), CARD)
    assert "unknown: the data set was changed since" in (tmp_path / "README.md").read_text()


def test_an_imported_model_has_a_card_too(tmp_path: Path) -> None:
    facts = {"step": 0, "slot": 0, "tokens": 0, "settings": {}, "model": asdict(Config.from_name("debug"))}
    write_card(tmp_path, published(tmp_path / "iter-00000000-ckpt.pth", facts), CARD)
    assert "| data set | unknown |" in (tmp_path / "README.md").read_text()


def test_a_line_that_a_kill_cut_short_is_left_out(checkpoint: Checkpoint) -> None:
    path = checkpoint.path.parent / "metrics.csv"
    with path.open("a") as file:
        file.write("1")
    assert [row["step"] for row in read_metrics(path, 40)] == ["10", "20", "30"]
