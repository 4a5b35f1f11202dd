"""The comparison of logits: a streamed pass equals a plain one bit for bit, ours equals transformers', faults show."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from lit_gpt.cli import BadInput
from lit_gpt.config import Config
from lit_gpt.export.hf_weights import hf_config, to_hf
from lit_gpt.export.parity import Reference, compare, fetch_from, logits, pieces
from lit_gpt.model.gpt import GPT, initialize
from scripts import generate

TOKENS = torch.randint(0, 70, (48,), generator=torch.Generator().manual_seed(1))


def shape(n_query_groups: int) -> Config:
    return Config(
        "tiny", n_layer=3, n_head=4, n_query_groups=n_query_groups, n_embd=64, intermediate_size=96, vocab_size=70
    )


def our_model(config: Config) -> GPT:
    model = GPT(config)
    initialize(model, seed=1)
    with torch.no_grad():
        for block in model.transformer.h:  # norms that are not 1, so that mixing them up shows
            block.norm_1.weight.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(2))
    return model


def their_model(config: Config) -> LlamaForCausalLM:
    facts = hf_config(config, dtype=torch.float32, vocabulary_rows=config.padded_vocab_size, bos_id=1, eos_id=2)
    return LlamaForCausalLM(LlamaConfig(**facts))


@pytest.mark.slow
@pytest.mark.parametrize("n_query_groups", [1, 2, 4])
def test_logits_and_gradients_equal_those_of_transformers(n_query_groups: int) -> None:
    config = shape(n_query_groups)
    ours, theirs = our_model(config), their_model(config)
    theirs.load_state_dict(dict(to_hf(config, ours.state_dict().items(), 128)))
    assert compare(ours(TOKENS[None])[0].detach(), theirs(TOKENS[None]).logits[0].detach()).difference <= 1e-5

    targets = TOKENS.roll(-1)
    ours(TOKENS[None], targets=targets[None]).backward()
    theirs.get_input_embeddings().padding_idx = None  # transformers' embedding gives the padding token no gradient
    torch.nn.functional.cross_entropy(theirs(TOKENS[None]).logits[0], targets, reduction="sum").backward()
    gradients = dict(to_hf(config, ((name, weight.grad) for name, weight in ours.named_parameters()), 128))
    for name, weight in theirs.named_parameters():
        assert (gradients[name] - weight.grad).norm() <= 1e-5 * weight.grad.norm(), name


def test_the_streamed_pass_is_the_plain_pass_and_keeps_no_weight() -> None:
    config = shape(2)
    ours, theirs = our_model(config), their_model(config)
    weights = theirs.state_dict()
    with torch.device("meta"):
        our_twin, their_twin = GPT(config), their_model(config)
    their_twin.model.rotary_emb = type(their_twin.model.rotary_emb)(their_twin.config)
    backwards = reversed(ours.state_dict().items())  # a sharded checkpoint need not have the model's order
    with torch.no_grad():
        assert torch.equal(logits(our_twin, fetch_from(backwards), TOKENS), ours(TOKENS[None])[0])
        streamed = logits(their_twin, lambda names: {name: weights[name] for name in names}, TOKENS)
        assert torch.equal(streamed, theirs(TOKENS[None]).logits[0])
    assert {weight.device.type for weight in [*our_twin.parameters(), *their_twin.parameters()]} == {"meta"}
    assert not any(module._forward_hooks or module._forward_pre_hooks for _, module in pieces(our_twin))


def test_one_row_out_of_place_is_found() -> None:
    config = shape(2)
    ours, theirs = our_model(config), their_model(config)
    weights = dict(to_hf(config, ours.state_dict().items(), 128))
    name = "model.layers.1.self_attn.k_proj.weight"
    weights[name] = weights[name].roll(1, 0)
    theirs.load_state_dict(weights)
    with torch.no_grad(), pytest.raises(BadInput, match="the logits of both sides differ"):
        compare(ours(TOKENS[None])[0], theirs(TOKENS[None]).logits[0])


def test_not_a_number_and_absent_padding() -> None:
    with pytest.raises(BadInput, match="differ"):
        compare(torch.tensor([[1.0, float("nan")]]), torch.ones(1, 2))
    assert compare(torch.tensor([[2.0, 1.0, 9.0]]), torch.tensor([[2.0, 1.0]])).difference == 0


def test_code_of_a_foreign_tokenizer_is_not_run_whoever_says_yes(
    tokenizer_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, ran = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(tokenizer_path, folder)
    named = {"auto_map": {"AutoTokenizer": ["code.Odd", "code.Odd"]}, "tokenizer_class": "Odd"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    (folder / "config.json").write_text('{"model_type": "odd", "auto_map": {"AutoConfig": "code.Odd"}}')
    (folder / "code.py").write_text(f"open({str(ran)!r}, 'w')")
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    with pytest.raises(BadInput, match=r"transformers cannot read the tokenizer of .*custom code"):
        Reference(transformers).encoder(folder)
    with pytest.raises(BadInput, match=r"transformers cannot load .*custom code"):
        generate.main(["--model", str(folder), "--prompt", "a"])
    assert not ran.exists()
    assert sys.stdin.read() == "y\n" * 9
