"""Programs that others wrote read an exported folder: with and without BOS, the vocabulary cut and kept.

The model knows the beginning of a text by heart, so that its greedy continuation is that text, whatever the rounding.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import tokenizers
import torch
import yaml
from _pytest.mark.structures import ParameterSet
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    pipeline,
)

from lit_gpt.config import Config
from lit_gpt.data.tokenizer import Tokenizer
from lit_gpt.eval.evaluation import Score, task_scores
from lit_gpt.export import llama_cpp
from lit_gpt.export.parity import GERMAN_TEXT
from lit_gpt.model.gpt import GPT, initialize
from scripts import convert_gguf
from tests.export.test_convert import changed_run, export

SENTENCES = [GERMAN_TEXT[:15], GERMAN_TEXT[:51], GERMAN_TEXT[:2]]
"""Beginnings of the text, "Im" the shortest, so that a batch of them is padded."""
KINDS = {
    "raw-padded": (False, "padded"),
    "bos-cut": (True, "cut"),
    "raw-cut": (False, "cut"),
    "bos-padded": (True, "padded"),
}


def long(*values: str) -> list[ParameterSet]:
    return [pytest.param(value, marks=pytest.mark.long) for value in values]


@pytest.fixture(scope="module")
def learned(tokenizer_path: Path) -> GPT:
    """A model that gives the first 99 ids of the text, with and without BOS (id 0) before them."""
    ids = Tokenizer.from_folder(tokenizer_path).encode(GERMAN_TEXT)[:99]
    rows = torch.tensor([[*ids, 1], [0, *ids]])
    model = GPT(Config.from_name("debug", vocab_size=300))
    initialize(model, seed=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.003)
    for _ in range(30):
        logits = model(rows[:, :-1])
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.requires_grad_(False)


@pytest.fixture(scope="module", params=["raw-padded", "bos-cut", *long("raw-cut", "bos-padded")])
def folder(
    request: pytest.FixtureRequest,
    run_dir: Path,
    learned: GPT,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The same weights exported, each text with and without BOS (id 0), the vocabulary cut and kept."""
    add_bos, vocabulary = KINDS[request.param]
    root = tmp_path_factory.mktemp(request.param)
    run = changed_run(run_dir, root, dict(learned.named_parameters()), add_bos=add_bos)
    export(run, root / "hf", "--dtype", "fp32", "--vocabulary", vocabulary, step=9)
    return root / "hf"


def loaded(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def ids_of(folder: Path, text: str, *, special: bool = True) -> list[int]:
    """The ids of the folder's tokenizer, read without transformers."""
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    return backend.encode(text, add_special_tokens=special).ids


def prompts_and_what_follows(folder: Path, tokens: int) -> tuple[list[list[int]], list[list[int]]]:
    """The ids of the sentences, and the next ones of the text."""
    whole = ids_of(folder, GERMAN_TEXT)
    prompts = [ids_of(folder, sentence) for sentence in SENTENCES]
    assert all(whole[: len(prompt)] == prompt for prompt in prompts)
    return prompts, [whole[len(prompt) : len(prompt) + tokens] for prompt in prompts]


def test_a_batch_gives_what_each_text_gives_alone(folder: Path) -> None:
    model, tokenizer = loaded(folder)
    run = pipeline("text-generation", model=model, tokenizer=tokenizer, batch_size=3)
    found = run(SENTENCES, max_new_tokens=8, do_sample=False, return_tensors=True)
    for prompt, after, answer in zip(*prompts_and_what_follows(folder, 8), found, strict=True):
        ids = answer[0]["generated_token_ids"]
        assert ids[-len(prompt) - 8 :] == prompt + after
    with torch.no_grad():
        together = model(**tokenizer(SENTENCES, padding=True, return_tensors="pt")).logits[:, -1]
        alone = [model(**tokenizer(sentence, return_tensors="pt")).logits[0, -1] for sentence in SENTENCES]
    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-4, atol=1e-5)


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
    torch.manual_seed(1)  # of the adapter's weights
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


@pytest.mark.slow
def test_sentence_transformers_pools_the_real_tokens(folder: Path) -> None:
    """Of a folder that says nothing else, it takes the last token's state; users of older models ask for the mean."""
    library = pytest.importorskip("sentence_transformers")
    model = library.SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    mean = library.sentence_transformer.modules.Pooling(128, "mean")
    plain, tokenizer = loaded(folder)
    with torch.no_grad():
        alone = [plain.model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0] for text in SENTENCES]
    by_mean = library.SentenceTransformer(modules=[model[0], mean], device="cpu")
    for pooled, expected in (
        (model, [states[-1] for states in alone]),
        (by_mean, [states.mean(0) for states in alone]),
    ):
        found = torch.tensor(pooled.encode(SENTENCES))
        torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["q8_0", *long("f16", "bf16")])
def test_llama_cpp_gives_the_ids_and_the_greedy_tokens(folder: Path, tmp_path: Path, kind: str) -> None:
    pytest.importorskip("xllamacpp")
    path = tmp_path / "m.gguf"
    convert_gguf.main(["--model", str(folder), "--destination_path", str(path), "--type", kind])
    prompts, after = prompts_and_what_follows(folder, 40)
    assert llama_cpp.tokenize(path, [], SENTENCES) == prompts
    assert llama_cpp.continue_greedily(path, prompts, 40) == after


def likelihood(model: GPT, folder: Path, before: list[int], scored: list[int]) -> float:
    """log P (nats) of `scored` after `before`, by our model, with the padding ids only where the folder has them."""
    rows = 300 if "cut" in folder.parent.name else 320
    log_p = model(torch.tensor([[*before, *scored[:-1]]]))[0, -len(scored) :, :rows].log_softmax(-1)
    return log_p.gather(1, torch.tensor(scored)[:, None]).sum().item()


def bits_per_byte(model: GPT, folder: Path, text: str, *, begin: list[int]) -> float:
    """From the definition: each id once, after all ids before it that fit with it into the model, the first after BOS;
    windows of 256 ids, the last one filled up from the left. begin: ids between BOS and the text."""
    ids = [0, *begin, *ids_of(folder, text, special=False)]
    nats = 0.0
    for start in range(0, len(ids) - 1, 256):
        stop = min(start + 256, len(ids) - 1)
        nats -= likelihood(model, folder, ids[max(0, stop - 256) : start + 1], ids[start + 1 : stop + 1])
    return nats / math.log(2) / len(text.encode())


def scores_of(folder: Path, scratch: Path, name: str, records: list[dict[str, object]], **task: object) -> list[Score]:
    """What lm-eval measures of `records`, a task's data."""
    pytest.importorskip("lm_eval")
    (scratch / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    task |= {"task": name, "dataset_path": "json", "test_split": "test"}
    task["dataset_kwargs"] = {"data_files": {"test": str(scratch / "data.jsonl")}}
    (scratch / "task.yaml").write_text(yaml.safe_dump(task))
    return task_scores(folder, [name], scratch, torch.device("cpu"), batch_size=2, limit=None)


@pytest.mark.slow
@pytest.mark.parametrize("repeats", [1, 4])
def test_perplexity_of_lm_eval_is_that_after_one_bos(folder: Path, learned: GPT, tmp_path: Path, repeats: int) -> None:
    """A text that fits into the model's 256 positions only in part, and a longer one."""
    text = " ".join([GERMAN_TEXT] * repeats)
    found = scores_of(
        folder, tmp_path, "german_bits", [{"text": text}], output_type="loglikelihood_rolling",
        doc_to_text="", doc_to_target="{{text}}", metric_list=[{"metric": "bits_per_byte"}],
    )  # fmt: skip
    right = bits_per_byte(learned, folder, text, begin=[])
    assert [(score.metric, score.value) for score in found] == [("bits_per_byte", pytest.approx(right, rel=1e-5))]
    assert abs(right - bits_per_byte(learned, folder, text, begin=[0])) > 1e-4 * right  # a second BOS would show


QUESTIONS = [
    (GERMAN_TEXT[:15], ["zog die Schäferin", "zog der Hirte", "ging"], 0),
    (GERMAN_TEXT[:51], ["im Wald", "über die Mainbrücke", "am Abend heim"], 1),
    ("Der Nebel", ["lag noch über", "war fort", "stieg"], 2),
    ("", ["Im Morgengrauen", "Am Abend", "Zur Nacht"], 1),
]
"""Context, choices, which of them is right."""


def scores_by_hand(model: GPT, folder: Path) -> dict[str, float]:
    """The choices' likelihoods after the context, or after BOS where there is none; the likeliest one is taken, in
    acc_norm divided by its characters; the Brier score is of the likelihoods' softmax."""
    right = dict.fromkeys(("acc", "acc_norm", "brier_score"), 0.0)
    for context, choices, answer in QUESTIONS:
        before = ids_of(folder, context) if context else [0]
        scored = [ids_of(folder, f"{context} {choice}", special=bool(context)) for choice in choices]
        scored = [ids[len(before) :] if context else ids for ids in scored]
        log_p = torch.tensor([likelihood(model, folder, before, ids) for ids in scored])
        characters = torch.tensor([len(choice) for choice in choices])
        right["acc"] += (log_p.argmax() == answer).item() / len(QUESTIONS)
        right["acc_norm"] += ((log_p / characters).argmax() == answer).item() / len(QUESTIONS)
        one_hot = torch.nn.functional.one_hot(torch.tensor(answer), len(choices))
        right["brier_score"] += (log_p.softmax(0) - one_hot).square().sum().item() / len(QUESTIONS)
    return right


@pytest.mark.slow
def test_multiple_choice_of_lm_eval(folder: Path, learned: GPT, tmp_path: Path) -> None:
    records = [{"context": context, "choices": choices, "answer": answer} for context, choices, answer in QUESTIONS]
    right = scores_by_hand(learned, folder)
    found = scores_of(
        folder, tmp_path, "german_choices", records, output_type="multiple_choice", doc_to_text="{{context}}",
        doc_to_choice="{{choices}}", doc_to_target="{{answer}}", metric_list=[{"metric": name} for name in right],
    )  # fmt: skip
    assert {score.metric: score.value for score in found} == pytest.approx(right, rel=1e-4)
    assert right["acc"] >= 0.5  # both contexts that it knows by heart
