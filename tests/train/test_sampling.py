"""Samples of the running model: transformers' text, the same on every rank, without effect on the training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_gpt.cli import BadInput
from lit_gpt.config import Config
from lit_gpt.data.loader import full_rows
from lit_gpt.model.gpt import GPT, initialize
from lit_gpt.train.sampling import Sample, open_prompts
from lit_gpt.train.settings import SamplingSettings, TrackerSettings
from lit_gpt.train.trackers import Trackers
from scripts import convert_lit_checkpoint
from tests.support.training import full_state, metrics, train

PROMPTS = ["Der alte Hund", "Das Kind sieht", "Am Abend"]
SAMPLING: dict[str, Any] = dict(sample_interval_steps=4, sample_prompts=json.dumps(PROMPTS), sample_tokens=20)


def samples(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]


def train_again(german_run: Path, out: Path, **settings: object) -> None:
    """The run of tests/support/german_run.py, otherwise asked for."""
    data = german_run.parent
    train(data / "data", out, tokenizer_path=data / "tokenizer", keep_last_checkpoints=0, **settings)


@pytest.fixture(scope="module")
def sampled(german_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run with samples; a micro-batch has 2 rows, so that the 3 prompts take two."""
    out = tmp_path_factory.mktemp("sampled") / "run"
    train_again(german_run, out, micro_batch_size=2, tensorboard="true", **SAMPLING)
    return out


@pytest.mark.slow
def test_samples_change_nothing(german_run: Path, tmp_path: Path) -> None:
    """Losses, weights, optimizer and RNG, bit by bit; drawing, too."""
    train_again(german_run, tmp_path, sample_temperature=1.0, **SAMPLING)
    assert len(samples(tmp_path)) == 9
    assert metrics(tmp_path) == metrics(german_run)
    got, wanted = full_state(tmp_path, 12), full_state(german_run, 12)
    assert [name for name in wanted if not torch.equal(got[name], wanted[name])] == []


@pytest.mark.slow
def test_greedy_samples_are_what_transformers_generates(sampled: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = samples(sampled)
    assert [(sample["step"], sample["prompt"]) for sample in found] == [(s, p) for s in (4, 8, 12) for p in PROMPTS]
    checkpoint = str(sampled / "iter-00000012-ckpt.pth")
    folder = tmp_path / "hf"
    convert_lit_checkpoint.main(["--checkpoint", checkpoint, "--destination_path", str(folder), "--dtype", "fp32"])
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    for sample in found[-3:]:
        ids = tokenizer(sample["prompt"], return_tensors="pt")
        whole = model.generate(**ids, max_new_tokens=20, do_sample=False)[0]
        assert sample["prompt"] + sample["text"] == tokenizer.decode(whole, skip_special_tokens=True)
        assert sample["tokens"] + sample["ended"] == len(whole) - ids.input_ids.shape[1]


def test_tensorboard_shows_them(sampled: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(sampled / "tensorboard"), size_guidance={"tensors": 0})
    events.Reload()
    shown = events.Tensors("samples/text_summary")
    assert [event.step for event in shown] == [4, 8, 12]
    assert "**Das Kind sieht**" in shown[0].tensor_proto.string_val[0].decode()


@pytest.mark.distributed
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_two_sharded_processes_write_what_one_writes(german_run: Path, tmp_path: Path, temperature: float) -> None:
    """Before the first update the weights are the same bits, afterwards nearly: the first step's samples must agree."""
    settings = {**SAMPLING, "sample_interval_steps": 1, "sample_temperature": temperature, "max_steps": 1}
    still = dict(warmup_steps=0, learning_rate=1e-30, min_lr=0, weight_decay=0)
    for devices in (1, 2):
        train_again(german_run, tmp_path / str(devices), devices=devices, micro_batch_size=2, **settings, **still)
    assert samples(tmp_path / "1") == samples(tmp_path / "2")
    assert len(samples(tmp_path / "1")) == 3


@pytest.mark.slow
def test_a_resumed_run_has_one_series(sampled: Path, german_run: Path, tmp_path: Path) -> None:
    for kept in ("metrics.csv", "samples.jsonl"):
        (tmp_path / kept).write_bytes((sampled / kept).read_bytes())
    with (tmp_path / "samples.jsonl").open("a") as file:
        file.write('{"step": 12, "prompt": "cut sh')
    checkpoint = sampled / "iter-00000008-ckpt.pth"
    more = dict(SAMPLING, sample_temperature=0)
    train_again(german_run, tmp_path, resume=checkpoint, micro_batch_size=2, **more)
    assert samples(tmp_path) == samples(sampled)


def test_logits_of_one_position_are_those_of_the_whole() -> None:
    model = GPT(Config.from_name("debug"))
    initialize(model, seed=0)
    tokens, at = torch.randint(4096, (3, 32)), torch.tensor([0, 31, 7])
    with torch.no_grad():
        whole, some = model(tokens), model(tokens, full_rows(3, 32), at=at)
    assert some.shape == (3, model.config.padded_vocab_size)
    torch.testing.assert_close(some, whole[torch.arange(3), at])
    assert full_rows(3, 32).tolist() == [0, 32, 64] + 61 * [96]


def test_a_resume_keeps_every_whole_line_and_no_other(tmp_path: Path) -> None:
    """A text may hold what Unicode calls the end of a line; a line that was cut is whole in no column."""
    for step in (1, 2, 3):
        trackers = Trackers(tmp_path, step - 1, TrackerSettings(tensorboard=False), {})
        trackers.log({"step": step, "loss": 1.5, "val_bits_per_byte": 2.25})
        trackers.log_samples(step, [Sample("a", f"{step}\u2028b\x85c", 2, False)])
        trackers.close()
    whole = (tmp_path / "metrics.csv").read_bytes()
    (tmp_path / "metrics.csv").write_bytes(whole[:-3])  # 2.2 for 2.25: as many columns as a whole line
    for left_over in ("metrics.csv.new", "samples.jsonl.new", ".metrics.csv.host-1.partial"):
        (tmp_path / left_over).touch()
    Trackers(tmp_path, 3, TrackerSettings(tensorboard=False), {}).close()
    assert [row["step"] for row in metrics(tmp_path)] == ["1", "2"]
    lines = (tmp_path / "samples.jsonl").read_text(encoding="utf-8").split("\n")
    assert [json.loads(line)["text"] for line in lines[:-1]] == [f"{step}\u2028b\x85c" for step in (1, 2, 3)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.csv", "samples.jsonl"]


def test_the_models_own_end_is_kept(tmp_path: Path) -> None:
    trackers = Trackers(tmp_path, 0, TrackerSettings(tensorboard=False), {})
    trackers.log_samples(3, [Sample("a", "ä\nb", 2, True)])
    trackers.close()
    assert samples(tmp_path) == [{"step": 3, "prompt": "a", "text": "ä\nb", "tokens": 2, "ended": True}]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(sample_tokens=255), r"'Der Hund' is \d+ tokens, which with --sample_tokens 255 exceed the model's 256"),
        (dict(sample_prompts=["Der Hund", ""]), "'' holds no token to begin with"),
        (dict(tokenizer_path=None), "needs --tokenizer_path"),
    ],
)
def test_prompts_that_do_not_fit(german_run: Path, settings: dict[str, Any], message: str) -> None:
    asked = dict(sample_interval_steps=1, sample_prompts=["Der Hund"], tokenizer_path=german_run.parent / "tokenizer")
    asked |= settings
    tokenizer_path = asked.pop("tokenizer_path")
    with pytest.raises(BadInput, match=message):
        open_prompts(SamplingSettings(**asked), tokenizer_path, 256, add_bos=False)


def test_refused_before_the_run_folder_is_made(german_run: Path, tmp_path: Path) -> None:
    data = german_run.parent
    done = train(
        data / "data", tmp_path / "run", expect=2, tokenizer_path=data / "tokenizer", **SAMPLING | {"sample_tokens": 99}
    )
    assert "exceed the model's 64" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "run").exists()
    done = train(data / "data", tmp_path / "run", expect=2, sample_interval_steps=1, sample_prompts="[]")
    assert "without --sample_prompts" in done.stderr
