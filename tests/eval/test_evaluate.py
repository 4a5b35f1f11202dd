"""Evaluation of a folder and of a checkpoint: both give the run's own validation loss, without a network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lit_gpt.cli import BadInput
from lit_gpt.data.token_store import TokenStore
from lit_gpt.data.tokenizer import Tokenizer
from lit_gpt.eval import evaluation
from lit_gpt.tasks.cloze import Item, make_items, texts_of_store
from scripts import convert_lit_checkpoint, evaluate, make_cloze
from tests.support.training import metrics

ROOT = Path(__file__).resolve().parents[2]
ITEMS = 24


@pytest.fixture(scope="module")
def model(german_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run's last checkpoint, exported in fp32."""
    folder = tmp_path_factory.mktemp("model") / "hf"
    checkpoint = str(german_run / "iter-00000012-ckpt.pth")
    convert_lit_checkpoint.main(["--checkpoint", checkpoint, "--destination_path", str(folder), "--dtype", "fp32"])
    return folder


@pytest.fixture(scope="module")
def task_dir(german_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cloze task of the run's validation split."""
    folder = tmp_path_factory.mktemp("tasks")
    data = german_run.parent
    make_cloze.main(
        ["--val_data_dir", str(data / "data/val"), "--tokenizer_path", str(data / "tokenizer"), "--destination_path",
         str(folder), "--items", str(ITEMS)]
    )  # fmt: skip
    return folder


@pytest.mark.slow
def test_perplexity_is_the_runs_own_validation_loss(german_run: Path, model: Path, tmp_path: Path) -> None:
    val = str(german_run.parent / "data/val")
    output = tmp_path / "scores.json"
    evaluate.main(["--model", str(model), "--val_data_dir", val, "--batch_size", "4", "--output", str(output)])
    found = json.loads(output.read_text())["validation"]
    trained = metrics(german_run)[-1]
    assert found["loss"] == pytest.approx(float(trained["val_loss"]), rel=1e-6)
    assert found["bits_per_byte"] == pytest.approx(float(trained["val_bits_per_byte"]), rel=1e-6)


def test_the_loss_tells_its_progress(
    german_run: Path, model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(evaluation, "TELL_S", 0)
    with caplog.at_level("INFO"):
        val = str(german_run.parent / "data/val")
        evaluate.main(["--model", str(model), "--val_data_dir", val, "--batch_size", "2", "--eval_max_rows", "5"])
    said = [record.getMessage() for record in caplog.records if record.name == evaluation.__name__]
    assert said[0] == "measuring the loss on 5 rows"
    assert [line.partition(",")[0] for line in said[1:]] == ["loss: 2 of 5 rows", "loss: 4 of 5 rows"]
    assert said[-1].endswith(" left")


def test_a_cut_vocabulary_leaves_out_the_padding(german_run: Path, model: Path, tmp_path: Path) -> None:
    """Against a plain computation: the softmax of the padded model goes over 512 ids, that of the cut one over 500."""
    checkpoint = str(german_run / "iter-00000012-ckpt.pth")
    arguments = ["--checkpoint", checkpoint, "--destination_path", str(tmp_path / "cut"), "--dtype", "fp32"]
    convert_lit_checkpoint.main([*arguments, "--vocabulary", "cut"])
    losses = []
    for folder in (model, tmp_path / "cut"):
        output = tmp_path / f"{folder.name}.json"
        val = str(german_run.parent / "data/val")
        evaluate.main(["--model", str(folder), "--val_data_dir", val, "--output", str(output)])
        losses.append(json.loads(output.read_text())["validation"]["loss"])
    assert losses[1] < losses[0]  # the padding's share of the probability is gone
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


@pytest.mark.slow
def test_folder_and_checkpoint_give_the_same_numbers_offline(
    german_run: Path, model: Path, task_dir: Path, tmp_path: Path
) -> None:
    pytest.importorskip("lm_eval")
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    sources = {"folder": ["--model", str(model)]}
    sources["checkpoint"] = ["--checkpoint", str(german_run / "iter-00000012-ckpt.pth"), "--dtype", "fp32"]
    found = {}
    for name, source in sources.items():
        (tmp_path / name).mkdir()
        more = ["--scratch_dir", str(tmp_path / name)] if name == "checkpoint" else []
        output = tmp_path / f"{name}.json"
        done = subprocess.run(
            [sys.executable, str(ROOT / "scripts/evaluate.py"), *source, *more, "--tasks", "german_cloze", "--task_dir",
             str(task_dir), "--val_data_dir", str(german_run.parent / "data/val"), "--output", str(output)],
            env={**offline, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "german_cloze" in done.stdout
        assert "bits_per_byte" in done.stdout
        assert list((tmp_path / name).iterdir()) == []
        found[name] = json.loads(output.read_text())
        del found[name]["model"]
    assert found["folder"] == found["checkpoint"]
    scores = {score["metric"]: score["value"] for score in found["folder"]["tasks"]}
    assert set(scores) == {"acc", "acc_norm"}
    assert scores["acc"] == pytest.approx(accuracy(model, task_dir), abs=1e-6)


def accuracy(model: Path, task_dir: Path) -> float:
    """Computed by transformers alone: the share of items whose true choice is the likeliest of the four."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    theirs, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    items = [Item(**json.loads(line)) for line in (task_dir / "german_cloze.jsonl").read_text().splitlines()]
    right = 0
    for item in items:
        likelihoods = []
        for sentence in item.choices:
            whole = tokenizer(f"{item.context} {sentence}").input_ids
            scored = len(whole) - len(tokenizer(item.context).input_ids)
            ids = torch.tensor([whole[-65:]])  # lm-eval: context and choice less the last token fill the 64 positions
            with torch.no_grad():
                log_p = theirs(ids[:, :-1]).logits.log_softmax(-1)[0, -scored:]
            likelihoods.append(log_p.gather(1, ids[0, -scored:, None]).sum().item())
        right += likelihoods.index(max(likelihoods)) == item.answer
    return right / len(items)


# The cloze task -------------------------------------------------------------------------------------------------------


def test_items_are_true_to_the_text_and_equal_for_equal_seeds(german_run: Path) -> None:
    data = german_run.parent
    tokenizer = Tokenizer.from_folder(data / "tokenizer")
    store = TokenStore.open(data / "data/val")
    held_out = [json.loads(line)["text"] for line in (data / "text.jsonl").read_text().splitlines()]
    decoded = list(texts_of_store(store, tokenizer))
    assert len(decoded) == store.documents
    assert set(decoded) <= set(held_out)
    items = make_items(decoded, 50, seed=1, max_documents=1000)
    assert items == make_items(decoded, 50, seed=1, max_documents=1000)
    assert items != make_items(decoded, 50, seed=2, max_documents=1000)
    assert len(items) == 50
    for item in items:
        own = [text for text in decoded if f"{item.context} {item.choices[item.answer]}" in text.replace("\n", " ")]
        assert own, item
        others = [choice for number, choice in enumerate(item.choices) if number != item.answer]
        assert len(set(others)) == 3
        assert not any(choice in text for text in own for choice in others)
        assert all(any(choice in text for text in decoded) for choice in others)
    assert {item.answer for item in items} == {0, 1, 2, 3}


def test_the_task_from_files_is_that_from_the_store(german_run: Path, task_dir: Path, tmp_path: Path) -> None:
    data = german_run.parent
    tokenizer = Tokenizer.from_folder(data / "tokenizer")
    lines = [json.dumps({"text": text}) for text in texts_of_store(TokenStore.open(data / "data/val"), tokenizer)]
    (tmp_path / "held_out.jsonl").write_text("\n".join(lines) + "\n")
    make_cloze.main(
        ["--source", str(tmp_path / "held_out.jsonl"), "--destination_path", str(tmp_path / "t"), "--items", str(ITEMS)]
    )
    assert (tmp_path / "t/german_cloze.jsonl").read_bytes() == (task_dir / "german_cloze.jsonl").read_bytes()


# Bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--val_data_dir", "absent"], "no data set in absent"),
        ([], "nothing to measure"),
        (["--tasks", "x", "--task_dir", "absent"], "--task_dir absent: no such folder"),
        (["--tasks", "x", "--limit", "0"], "--limit 0: must be at least 1"),
        (["--tasks", "x", "--output", "absent/x.json"], "--output absent/x.json: its folder does not exist"),
    ],
)
def test_evaluate_refuses_in_one_line(model: Path, flags: list[str], message: str) -> None:
    with pytest.raises(BadInput, match=message) as caught:
        evaluate.main(["--model", str(model), *flags])
    assert "\n" not in str(caught.value)


def test_evaluate_refuses_other_models_and_data(german_run: Path, model: Path, store: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"holds no config\.json"):
        evaluate.main(["--model", str(tmp_path), "--tasks", "x"])
    with pytest.raises(BadInput, match=r"a vocabulary of 512 ids with EOS 2, not of 500 with EOS 1"):
        evaluate.main(["--model", str(model), "--val_data_dir", str(store / "val")])
    checkpoint = german_run / "iter-00000012-ckpt.pth"
    with pytest.raises(BadInput, match="made with another tokenizer"):
        evaluate.main(["--checkpoint", str(checkpoint), "--val_data_dir", str(store / "val")])


@pytest.mark.slow
def test_an_unknown_task_is_refused_with_its_neighbours(model: Path, task_dir: Path) -> None:
    pytest.importorskip("lm_eval")
    with pytest.raises(BadInput, match=r"--tasks german_close: no task of lm-eval or of .*german_cloze"):
        evaluate.main(["--model", str(model), "--tasks", "german_close", "--task_dir", str(task_dir)])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--source", "absent.jsonl"], "there is no such file"),
        (["--val_data_dir", "x"], "--val_data_dir and --tokenizer_path go together"),
        (["--source", "x", "--items", "0"], "--items 0: must be at least 1"),
        (["--source", "x", "--name", "a/b"], "--name a/b"),
    ],
)
def test_make_cloze_refuses_in_one_line(tmp_path: Path, flags: list[str], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        make_cloze.main([*flags, "--destination_path", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_too_little_text_for_a_cloze_task() -> None:
    with pytest.raises(BadInput, match="2 documents, too little text"):
        make_items(["Ein Satz, der lang genug ist, steht hier. Und noch einer, der folgt."] * 2, 5, 0, max_documents=9)
