"""GGUF files: read by gguf, transformers and llama.cpp, which generates the same greedy tokens."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lit_gpt.cli import BadInput
from lit_gpt.config import Config
from lit_gpt.data.tokenizer import Tokenizer
from lit_gpt.export import llama_cpp
from lit_gpt.export.hf_folder import HFWeights, write_weights
from lit_gpt.export.hf_tokenizer import write_tokenizer
from lit_gpt.export.hf_weights import hf_config, hf_generation_config, hf_shapes, to_hf
from lit_gpt.export.parity import GERMAN_TEXT
from lit_gpt.files import write_json
from lit_gpt.model.gpt import GPT, initialize
from scripts import convert_gguf, train_tokenizer

gguf = pytest.importorskip("gguf")


def write_model(folder: Path, tokenizer_path: Path) -> Path:
    """A small exported model with the tokenizer of `tokenizer_path`."""
    tokenizer = Tokenizer.from_folder(tokenizer_path)
    config = Config.from_name("debug", vocab_size=tokenizer.vocab_size)
    rows = config.padded_vocab_size
    model = GPT(config)
    initialize(model, seed=1)
    with torch.no_grad():
        for block in model.transformer.h:  # attention that looks at places, so that a wrong rotation shows
            block.attn.qkv.weight *= 3
            block.attn.proj.weight *= 5
    folder.mkdir()
    facts = {"bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id, "vocabulary_rows": rows}
    write_json(folder / "config.json", hf_config(config, dtype=torch.float32, **facts))
    write_json(folder / "generation_config.json", hf_generation_config(vocab_size=config.vocab_size, **facts))
    write_tokenizer(tokenizer, folder, block_size=config.block_size, add_bos=False)
    weights = to_hf(config, model.state_dict().items(), rows)
    write_weights(folder, hf_shapes(config, rows), torch.float32, weights, 10**9)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported model with one of the project's own byte-level tokenizers."""
    root = tmp_path_factory.mktemp("gguf")
    record = {"id": "a", "text": GERMAN_TEXT}
    (root / "text.jsonl").write_text(json.dumps(record) + "\n")
    train_tokenizer.main(
        ["--source", str(root / "text.jsonl"), "--destination_path", str(root / "tokenizer"), "--vocab_size", "400"]
    )
    return write_model(root / "model", root / "tokenizer")


def convert(model: Path, destination: Path, kind: str) -> Path:
    convert_gguf.main(["--model", str(model), "--destination_path", str(destination), "--type", kind])
    return destination


def value(reader: object, key: str) -> object:
    return reader.fields[key].contents()


@pytest.mark.parametrize(("kind", "bound"), [("f16", 1e-3), ("bf16", 1e-2), ("q8_0", 1e-2)])
def test_gguf_reads_back_every_weight_and_fact(model: Path, tmp_path: Path, kind: str, bound: float) -> None:
    reader = gguf.GGUFReader(convert(model, tmp_path / "m.gguf", kind))
    weights = HFWeights(model)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert len(tensors) == len(weights.names) == 4 * 9 + 3
    for ours, theirs in (
        ("model.embed_tokens.weight", "token_embd.weight"),
        ("model.layers.2.mlp.down_proj.weight", "blk.2.ffn_down.weight"),
        ("model.layers.3.self_attn.v_proj.weight", "blk.3.attn_v.weight"),
        ("model.norm.weight", "output_norm.weight"),
        ("lm_head.weight", "output.weight"),
    ):
        expected = weights.read(ours).numpy()
        found = gguf.dequantize(tensors[theirs].data, tensors[theirs].tensor_type)
        assert found.shape == expected.shape
        assert np.abs(found - expected).max() <= bound * np.abs(expected).max(), ours
    assert tensors["output_norm.weight"].tensor_type.name == "F32"
    assert tensors["output.weight"].tensor_type.name == kind.upper()
    assert value(reader, "llama.attention.head_count_kv") == 2
    assert value(reader, "llama.rope.dimension_count") == 32
    assert value(reader, "tokenizer.ggml.model") == "gpt2"
    assert value(reader, "tokenizer.ggml.pre") == "ufakzeka"
    assert len(value(reader, "tokenizer.ggml.tokens")) == len(value(reader, "tokenizer.ggml.token_type")) == 448
    assert [value(reader, f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "padding")] == [0, 1, 1]
    assert value(reader, "tokenizer.ggml.add_bos_token") is False


def test_rows_of_queries_and_keys_lie_as_llama_cpp_turns_them(model: Path, tmp_path: Path) -> None:
    """llama.cpp rotates rows 2 i and 2 i + 1 of a head together; transformers i and i + 16 (heads of 32)."""
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(convert(model, tmp_path / "m.gguf", "f16")).tensors}
    for name, heads in (("q", 4), ("k", 2)):
        expected = HFWeights(model).read(f"model.layers.1.self_attn.{name}_proj.weight").half().numpy()
        found = tensors[f"blk.1.attn_{name}.weight"].data
        for head in range(heads):
            for i in range(16):
                assert (found[32 * head + 2 * i] == expected[32 * head + i]).all()
                assert (found[32 * head + 2 * i + 1] == expected[32 * head + 16 + i]).all()


@pytest.mark.slow
def test_transformers_computes_the_same_from_it(model: Path, tmp_path: Path) -> None:
    """transformers reorders the rows of q and k back, by its own code."""
    pytest.importorskip("accelerate")
    convert(model, tmp_path / "m.gguf", "f16")
    original = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    again = LlamaForCausalLM(LlamaConfig.from_pretrained(model))
    again.load_state_dict(
        AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32).state_dict()
    )
    tokens = torch.randint(400, (1, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, found = original(tokens).logits, again(tokens).logits
    assert (expected - found).abs().max() <= 5e-3 * expected.abs().max()


def greedy(model: Path, prompt: str, count: int) -> tuple[list[int], list[int]]:
    """Prompt ids and the likeliest continuation, by transformers."""
    ids = torch.tensor([Tokenizer.from_folder(model).encode(prompt)])
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    out = loaded.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count)
    return ids[0].tolist(), out[0, ids.shape[1] :].tolist()


def test_llama_cpp_gives_the_same_tokens(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    path = convert(model, tmp_path / "m.gguf", "f16")
    prompts = ["Im Nebel", "Größere Herden, 12 Lämmer:\n\n  »Wer zählt?« Grimm'sche"]
    expected = [greedy(model, prompt, 24) for prompt in prompts]
    assert llama_cpp.tokenize(path, prompts) == [ids for ids, _ in expected]
    assert llama_cpp.continue_greedily(path, [ids for ids, _ in expected], 24) == [after for _, after in expected]


@pytest.mark.slow
def test_the_published_tokenizer(shared: Path, tmp_path: Path) -> None:
    reader = gguf.GGUFReader(
        convert(write_model(tmp_path / "model", shared / "tokenizer"), tmp_path / "m.gguf", "q8_0")
    )
    assert value(reader, "tokenizer.ggml.model") == "llama"
    assert value(reader, "tokenizer.ggml.add_space_prefix") is False
    tokens, scores = value(reader, "tokenizer.ggml.tokens"), value(reader, "tokenizer.ggml.scores")
    types = value(reader, "tokenizer.ggml.token_type")
    assert tokens[:4] == ["<unk>", "<s>", "</s>", "en"]
    assert (types[0], types[1], types[32_001], types[32_063]) == (2, 3, 4, 5)
    assert scores[3] == 0 > scores[4]
    pytest.importorskip("xllamacpp")
    cases = json.loads((shared / "tokenizer" / "golden_ids.json").read_text())["cases"]
    found = llama_cpp.tokenize(tmp_path / "m.gguf", [case["text"] for case in cases])
    for case, ids in zip(cases, found, strict=True):  # llama.cpp has no <unk> for single characters
        assert ids == (None if 0 in case["ids"] else case["ids"]), case["text"]
    assert sum(ids is not None for ids in found) > 30


def test_what_cannot_be_converted(model: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"holds no config\.json"):
        convert(tmp_path, tmp_path / "m.gguf", "f16")
    (tmp_path / "m.gguf").write_text("")
    with pytest.raises(BadInput, match="exists already"):
        convert(model, tmp_path / "m.gguf", "f16")
    with pytest.raises(BadInput, match=r"cannot write .*: (Not a directory|File exists)"):
        convert(model, tmp_path / "m.gguf" / "x", "f16")
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in model.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    rules = json.loads((broken / "tokenizer.json").read_text())
    rules["pre_tokenizer"]["pretokenizers"][1]["pattern"]["Regex"] = r"\w\w|\W"
    (broken / "tokenizer.json").write_text(json.dumps(rules))
    with pytest.raises(BadInput, match="no first split that gives this tokenizer's ids"):
        convert(broken, tmp_path / "n.gguf", "f16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "m.gguf"]
