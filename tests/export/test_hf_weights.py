"""The table of weights, compared with transformers' LlamaForCausalLM: names, shapes, order of row blocks; errors."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from lit_gpt.cli import BadInput
from lit_gpt.config import REGISTRY, Config
from lit_gpt.export.hf_weights import (
    config_from_hf,
    hf_config,
    hf_generation_config,
    hf_shapes,
    to_hf,
    to_lit,
    unread_keys,
    weights,
)

GROUPED = Config("grouped", n_layer=2, n_head=4, n_query_groups=2, n_embd=32, intermediate_size=48, vocab_size=70)
FULL = Config("full", n_layer=2, n_head=4, n_query_groups=4, n_embd=32, intermediate_size=48, vocab_size=70)


def random_weights(config: Config) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {weight.name: torch.randn(weight.shape, generator=generator) for weight in weights(config)}


def facts_of(config: Config, rows: int) -> dict:
    return hf_config(config, dtype=torch.float32, vocabulary_rows=rows, bos_id=1, eos_id=2)


@pytest.mark.parametrize("name", REGISTRY)
def test_every_registered_shape_is_a_llama_of_transformers(name: str) -> None:
    config = Config.from_name(name)
    rows = config.padded_vocab_size
    with torch.device("meta"):
        theirs = LlamaForCausalLM(LlamaConfig(**facts_of(config, rows))).state_dict()
    assert hf_shapes(config, rows) == {key: tuple(value.shape) for key, value in theirs.items()}
    assert sum(torch.Size(weight.shape).numel() for weight in weights(config)) == config.parameters


@pytest.mark.parametrize("config", [GROUPED, FULL], ids=lambda config: config.name)
def test_row_blocks_land_where_transformers_reads_them(config: Config) -> None:
    ours = random_weights(config)
    theirs = dict(to_hf(config, ours.items(), config.padded_vocab_size))
    q, k = config.n_head * 8, config.n_query_groups * 8
    qkv, gate_up = ours["transformer.h.1.attn.qkv.weight"], ours["transformer.h.1.mlp.gate_up.weight"]
    assert torch.equal(theirs["model.layers.1.self_attn.q_proj.weight"], qkv[:q])
    assert torch.equal(theirs["model.layers.1.self_attn.k_proj.weight"], qkv[q : q + k])
    assert torch.equal(theirs["model.layers.1.self_attn.v_proj.weight"], qkv[q + k :])
    assert torch.equal(theirs["model.layers.1.mlp.gate_proj.weight"], gate_up[:48])
    assert torch.equal(theirs["model.layers.1.mlp.up_proj.weight"], gate_up[48:])
    LlamaForCausalLM(LlamaConfig(**facts_of(config, config.padded_vocab_size))).load_state_dict(theirs, strict=True)


@pytest.mark.parametrize("config", [GROUPED, FULL], ids=lambda config: config.name)
def test_there_and_back_is_the_identity(config: Config) -> None:
    ours = random_weights(config)
    theirs = dict(to_hf(config, ours.items(), config.padded_vocab_size))
    again = dict(to_lit(config, theirs, theirs.__getitem__, config.padded_vocab_size))
    assert list(again) == list(ours)
    assert all(torch.equal(again[name], tensor) for name, tensor in ours.items())


def test_a_cut_vocabulary_comes_back_with_rows_that_hardly_raise_the_loss() -> None:
    ours = random_weights(GROUPED)
    theirs = dict(to_hf(GROUPED, ours.items(), 70))
    assert theirs["lm_head.weight"].shape == theirs["model.embed_tokens.weight"].shape == (70, 32)
    again = dict(to_lit(GROUPED, theirs, theirs.__getitem__, 70))
    for name in ("lm_head.weight", "transformer.wte.weight"):
        assert again[name].shape == (128, 32)
        assert torch.equal(again[name][:70], ours[name][:70])
    hidden = torch.randn(16, 32)
    cut, padded = (torch.logsumexp(hidden @ head.T, -1) for head in (theirs["lm_head.weight"], again["lm_head.weight"]))
    assert (padded - cut).max() <= torch.tensor(1 + 58 / 70).log() + 1e-5


def test_old_rotary_buffers_are_skipped() -> None:
    theirs = dict(to_hf(GROUPED, random_weights(GROUPED).items(), 128))
    theirs["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    assert len(list(to_lit(GROUPED, theirs, theirs.__getitem__, 128))) == 2 * 6 + 3


def test_missing_unknown_repeated_and_misshapen_weights_are_named() -> None:
    ours = random_weights(GROUPED)
    name = "transformer.h.1.mlp.down.weight"
    with pytest.raises(BadInput, match=r"transformer\.h\.1\.mlp\.down\.weight' is missing"):
        list(to_hf(GROUPED, [(key, value) for key, value in ours.items() if key != name], 128))
    with pytest.raises(BadInput, match=r"'transformer\.h\.9\.x' is unknown"):
        list(to_hf(GROUPED, {**ours, "transformer.h.9.x": ours[name]}.items(), 128))
    with pytest.raises(BadInput, match="twice"):
        list(to_hf(GROUPED, [*ours.items(), (name, ours[name])], 128))
    with pytest.raises(BadInput, match=r"down\.weight' has shape \(48, 32\), the model's shape needs \(32, 48\)"):
        list(to_hf(GROUPED, {**ours, name: ours[name].T}.items(), 128))

    theirs = dict(to_hf(GROUPED, ours.items(), 128))
    part = "model.layers.0.self_attn.k_proj.weight"
    with pytest.raises(BadInput, match=r"k_proj\.weight' is missing"):
        list(to_lit(GROUPED, [key for key in theirs if key != part], theirs.__getitem__, 128))
    with pytest.raises(BadInput, match=r"'model\.bias' is unknown"):
        list(to_lit(GROUPED, [*theirs, "model.bias"], theirs.__getitem__, 128))
    with pytest.raises(BadInput, match=r"k_proj\.weight' has shape"):
        list(to_lit(GROUPED, theirs, {**theirs, part: theirs[part][:3]}.__getitem__, 128))


def test_config_json_reads_the_same_in_transformers_and_here() -> None:
    config = Config.from_name("LLaMmlein_1B")
    facts = facts_of(config, 32_064)
    theirs = LlamaConfig(**facts)
    assert (theirs.num_key_value_heads, theirs.head_dim, theirs.vocab_size) == (4, 64, 32_064)
    frequencies = 10_000.0 ** (-torch.arange(0, 64, 2) / 64)
    assert LlamaRotaryEmbedding(config=theirs).inv_freq.tolist() == pytest.approx(frequencies.tolist())
    assert theirs.torch_dtype == torch.float32  # the name that transformers 4 and 5 both know
    assert not theirs.tie_word_embeddings
    assert config_from_hf(facts, model_name=None, vocab_size=32_010) == config
    written_by_transformers = theirs.to_dict()
    assert config_from_hf(written_by_transformers, model_name=None, vocab_size=None) == config
    cut = facts_of(config, 32_010)
    assert config_from_hf(cut, model_name="LLaMmlein_1B", vocab_size=32_010) == config


def test_generation_never_gives_a_padding_id() -> None:
    generation = hf_generation_config(vocab_size=70, vocabulary_rows=73, bos_id=1, eos_id=2)
    assert generation["suppress_tokens"] == [70, 71, 72]
    assert (generation["bos_token_id"], generation["eos_token_id"]) == (1, 2)
    assert "suppress_tokens" not in hf_generation_config(vocab_size=70, vocabulary_rows=70, bos_id=1, eos_id=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mistral"}, "model_type is 'mistral'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type is 'linear'"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}}, "rope_type is 'llama3'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"rope_parameters": {"partial_rotary_factor": 0.25}}, "partial_rotary_factor is 0.25"),
        ({"head_dim": 128}, "head_dim is 128"),
        ({"hidden_size": None}, "no hidden_size"),
        ({"vocab_size": 31_000}, "vocabulary mismatch: the folder's matrices have 31000 rows, its tokenizer 32010"),
        ({"num_hidden_layers": 23}, "no registered model has the folder's shape"),
    ],
)
def test_a_folder_that_is_not_ours_to_train_is_refused(change: dict, message: str) -> None:
    facts = facts_of(Config.from_name("LLaMmlein_1B"), 32_064) | change
    with pytest.raises(BadInput, match=message):
        config_from_hf(facts, model_name=None, vocab_size=32_010)


@pytest.mark.parametrize(
    ("rope", "base"),
    [
        ({"rope_theta": 5e5}, 5e5),
        ({"rope_theta": 5e5, "rope_parameters": {"rope_type": "default"}}, 5e5),
        ({"rope_theta": 5e5, "rope_parameters": {"rope_theta": 2e4}}, 2e4),
        ({"rope_theta": 5e5, "rope_scaling": {"type": "default"}}, 5e5),
        ({"rope_scaling": {"rope_type": "default", "rope_theta": 3e4}, "rope_parameters": {"rope_theta": 2e4}}, 3e4),
        ({"rope_scaling": {}, "rope_parameters": {"rope_theta": 2e4}}, 2e4),
        ({"rope_parameters": {"rope_type": "default"}}, 1e4),
        ({}, 1e4),
    ],
)
def test_the_base_of_rope_is_the_one_that_transformers_takes(rope: dict, base: float) -> None:
    facts = facts_of(Config.from_name("LLaMmlein_1B"), 32_064)
    facts = {key: value for key, value in facts.items() if not key.startswith("rope_")} | rope
    frequencies = base ** (-torch.arange(0, 64, 2) / 64)
    found = LlamaRotaryEmbedding(config=LlamaConfig(**copy.deepcopy(facts))).inv_freq
    assert found.tolist() == pytest.approx(frequencies.tolist())
    assert config_from_hf(facts, model_name=None, vocab_size=32_010).rope_base == base


def test_keys_of_config_json_that_nothing_here_follows() -> None:
    facts = facts_of(Config.from_name("debug"), 4096)
    assert unread_keys(facts) == []
    written_by_transformers = json.loads(LlamaConfig(**facts).to_json_string())
    assert unread_keys(written_by_transformers | {"logit_scale": 0.5, "sliding_window": None}) == ["logit_scale"]
    assert unread_keys({"rope_parameters": {"rope_theta": 1e4, "factor": 8.0}}) == ["rope_parameters.factor"]


def test_a_wrong_registry_name_names_the_field_and_the_right_names() -> None:
    facts = facts_of(Config.from_name("LLaMmlein_1B"), 32_064)
    with pytest.raises(BadInput, match=r"not a LLaMmlein_7B: its n_layer is 22, not 32.*LLaMmlein_1B"):
        config_from_hf(facts, model_name="LLaMmlein_7B", vocab_size=None)
    with pytest.raises(BadInput, match="unknown model_name 'LLaMmlein_2B'"):
        config_from_hf(facts, model_name="LLaMmlein_2B", vocab_size=None)
