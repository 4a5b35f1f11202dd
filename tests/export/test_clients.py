"""Programs that others wrote read an exported folder: with and without BOS, the vocabulary cut and kept."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    pipeline,
)

from lit_gpt.eval.evaluation import task_scores
from lit_gpt.export.parity import GERMAN_TEXT
from tests.export.test_convert import changed_run, export

SENTENCES = ["Am Morgen", "Der alte Wald an dem großen Fluss ist", "Sie"]
"""Of several lengths, so that a batch of them is padded."""


@pytest.fixture(scope="module")
def folders(run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same weights, with and without BOS (id 0), their vocabulary cut and kept."""
    made = {}
    for name, add_bos, vocabulary in [("raw", False, "padded"), ("bos", True, "cut")]:
        root = tmp_path_factory.mktemp(name)
        run = changed_run(run_dir, root, {}, add_bos=add_bos)
        export(run, root / "hf", "--dtype", "fp32", "--vocabulary", vocabulary, step=9)
        made[name] = root / "hf"
    return made


@pytest.fixture(scope="module", params=["raw", "bos"])
def folder(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Path:
    return folders[request.param]


def loaded(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def greedy(model: PreTrainedModel, ids: list[int], tokens: int) -> list[int]:
    """The likeliest ids of the vocabulary's 300, step by step, each from a full forward pass without padding."""
    for _ in range(tokens):
        with torch.no_grad():
            ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1, :300].argmax())]
    return ids


def test_a_batch_gives_what_each_text_gives_alone(folder: Path) -> None:
    model, tokenizer = loaded(folder)
    run = pipeline("text-generation", model=model, tokenizer=tokenizer, batch_size=3)
    found = run(SENTENCES, max_new_tokens=8, do_sample=False, return_tensors=True)
    for sentence, answer in zip(SENTENCES, found, strict=True):
        expected = greedy(model, tokenizer(sentence).input_ids, 8)
        ids = [id for id in answer[0]["generated_token_ids"] if id != tokenizer.pad_token_id]
        assert ids == [id for id in expected if id != tokenizer.pad_token_id]


def test_a_classification_head_takes_batches(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    with torch.no_grad():
        together = model(**tokenizer(SENTENCES, padding=True, return_tensors="pt")).logits
        alone = [model(**tokenizer(sentence, return_tensors="pt")).logits[0] for sentence in SENTENCES]
    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_lora_adapter_is_trained_and_merged(folder: Path, tmp_path: Path) -> None:
    """The merged weight is W + B A alpha / r, by hand; the merged folder computes what model and adapter did."""
    peft = pytest.importorskip("peft")
    model, tokenizer = loaded(folder)
    name = "model.layers.1.self_attn.v_proj"
    before = model.get_submodule(name).weight.detach().clone()
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]))
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    optimizer = torch.optim.AdamW([weight for weight in adapted.parameters() if weight.requires_grad], lr=0.01)
    losses = []
    for _ in range(3):
        loss = adapted(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]
    layer = model.get_submodule(name)
    change = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * 8 / 4
    adapted.eval()
    with torch.no_grad():
        expected = adapted(**batch).logits
        adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        found = merged(**batch).logits
    torch.testing.assert_close(merged.get_submodule(name).weight, before + change, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def bits_per_byte(folder: Path, text: str, *, prefix: int) -> float:
    """From the definition: each id once, after all ids before it that fit with it into the model, the first after
    `prefix`; windows of 256 ids, the last one filled up from the left."""
    model, tokenizer = loaded(folder)
    ids = [prefix, *tokenizer(text, add_special_tokens=False).input_ids]
    length, nats = 256, 0.0
    for start in range(0, len(ids) - 1, length):
        stop = min(start + length, len(ids) - 1)
        window = torch.tensor([ids[max(0, stop - length) : stop]])
        with torch.no_grad():
            log_p = model(window).logits[0].log_softmax(-1)
        scored = torch.tensor(ids[start + 1 : stop + 1])
        nats -= log_p[-len(scored) :].gather(1, scored[:, None]).sum().item()
    return nats / math.log(2) / len(text.encode())


@pytest.mark.slow
@pytest.mark.parametrize("repeats", [1, 4])
def test_perplexity_of_lm_eval_is_that_after_one_bos(folder: Path, tmp_path: Path, repeats: int) -> None:
    """A text that fits into the model's 256 positions only in part, and a longer one."""
    pytest.importorskip("lm_eval")
    text = " ".join([GERMAN_TEXT] * repeats)
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": text}) + "\n")
    task = {
        "task": "german_bits", "dataset_path": "json", "test_split": "test", "output_type": "loglikelihood_rolling",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "text.jsonl")}},
        "doc_to_text": "", "doc_to_target": "{{text}}", "metric_list": [{"metric": "bits_per_byte"}],
    }  # fmt: skip
    (tmp_path / "german_bits.yaml").write_text(yaml.safe_dump(task))
    found = task_scores(folder, ["german_bits"], tmp_path, torch.device("cpu"), batch_size=2, limit=None)
    assert [score.metric for score in found] == ["bits_per_byte"]
    right = bits_per_byte(folder, text, prefix=0)
    assert found[0].value == pytest.approx(right, rel=1e-5)
    assert abs(right - bits_per_byte(folder, f"<s>{text}", prefix=0)) > 1e-4 * right  # a second BOS would show
