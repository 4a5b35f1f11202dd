"""The model: transformers' LLaMA's logits and gradients, no attention across documents, initialization."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import lit_gpt.model
from lit_gpt.config import IGNORE_INDEX, Config
from lit_gpt.export.hf_weights import hf_config, to_hf
from lit_gpt.model.gpt import GPT, initialize

SHAPES = {
    "grouped": dict(n_layer=2, n_head=4, n_query_groups=2, n_embd=64, intermediate_size=96, vocab_size=100),
    "full": dict(n_layer=2, n_head=4, n_query_groups=4, n_embd=64, intermediate_size=96, vocab_size=100),
}


def make(heads: str, **options: object) -> GPT:
    model = GPT(Config.from_name("debug", block_size=64, **SHAPES[heads]), **options)  # type: ignore[arg-type]
    initialize(model, seed=1)
    return model


def difference(a: Tensor, b: Tensor) -> float:
    """Relative 2-norm of a - b."""
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("heads", SHAPES)
def test_logits_and_gradients_equal_transformers(heads: str) -> None:
    transformers = pytest.importorskip("transformers")
    ours = make(heads)
    rows = ours.config.padded_vocab_size
    facts = hf_config(ours.config, vocabulary_rows=rows, bos_id=1, eos_id=2, dtype=torch.float32)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**facts))
    theirs.load_state_dict(dict(to_hf(ours.config, ours.state_dict().items(), rows)))
    tokens = torch.randint(0, 100, (3, 64), generator=torch.Generator().manual_seed(0))
    logits = ours(tokens)
    assert difference(logits, theirs(tokens).logits) <= 1e-5

    targets = tokens.roll(-1, dims=1)
    targets[:, -1] = IGNORE_INDEX
    loss = ours(tokens, None, targets)
    expected = theirs(input_ids=tokens, labels=tokens).loss * (3 * 63)
    assert difference(loss, expected) <= 1e-6
    loss.backward()
    expected.backward()
    wanted = {name: p.grad for name, p in theirs.named_parameters()}
    got = dict(to_hf(ours.config, ((name, p.grad) for name, p in ours.named_parameters()), rows))
    assert set(got) == set(wanted)
    for name, gradient in got.items():
        assert difference(gradient, wanted[name]) <= 1e-5, name


@pytest.mark.slow
@pytest.mark.parametrize("heads", SHAPES)
def test_packed_documents_equal_the_same_documents_alone(heads: str) -> None:
    model = make(heads)
    tokens = torch.randint(0, 100, (2, 48), generator=torch.Generator().manual_seed(0))
    # Documents end inside rows and at their edges; the two entries at the end are empty segments, as batches have them.
    cu_seqlens = torch.tensor([0, 5, 6, 48, 80, 96, 96, 96], dtype=torch.int32)
    packed = model(tokens, cu_seqlens).flatten(0, 1)
    spans = [(0, 5), (5, 6), (6, 48), (48, 80), (80, 96)]
    alone = torch.cat([model(tokens.flatten()[None, start:end])[0] for start, end in spans])
    assert difference(packed, alone) <= 1e-6

    gradients = []
    targets = tokens.roll(-1, dims=1)
    flat_tokens, flat_targets = tokens.flatten()[None], targets.flatten()[None]
    one_by_one = [(flat_tokens[:, start:end], None, flat_targets[:, start:end]) for start, end in spans]
    for parts in ([(tokens, cu_seqlens, targets)], one_by_one):
        model.zero_grad()
        sum(model(*part) for part in parts).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert difference(*gradients) <= 1e-5


def test_a_token_sees_nothing_after_it() -> None:
    model = make("grouped")
    tokens = torch.randint(0, 100, (1, 32), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[0, 20:] = 7
    assert torch.equal(model(tokens)[0, :20], model(changed)[0, :20])


def test_too_long_a_row_is_refused() -> None:
    with pytest.raises(ValueError, match="65 tokens exceeds block_size 64"):
        make("full")(torch.zeros(1, 65, dtype=torch.int64))


@pytest.mark.parametrize(("weights", "bound"), [(torch.float32, 1e-3), (torch.bfloat16, 2e-3)])
def test_bf16_agrees_with_fp32_on_the_same_rows(weights: torch.dtype, bound: float) -> None:
    """bf16-mixed, whose weights and gradients stay fp32, and bf16-true."""
    exact, rounded = make("grouped"), make("grouped", compute_dtype=torch.bfloat16).to(weights)
    tokens = torch.randint(0, 100, (2, 64), generator=torch.Generator().manual_seed(0))
    targets = tokens.roll(-1, dims=1)
    losses = []
    for model in (exact, rounded):
        losses.append(model(tokens, None, targets))
        losses[-1].backward()
    assert rounded(tokens).dtype == torch.bfloat16
    assert difference(losses[1], losses[0]) <= bound
    for p, q in zip(rounded.parameters(), exact.parameters(), strict=True):
        assert p.dtype == p.grad.dtype == weights
        assert difference(p.grad, q.grad) <= 0.05  # bf16 has 8 bits: 0.4 % a rounding


def test_initial_weights() -> None:
    """Standard deviations of the GPT-NeoX form; a seed gives the same weights however the model came to be."""
    config = Config.from_name("debug", n_layer=3, n_embd=256, n_head=4, vocab_size=1024)
    model = GPT(config)
    initialize(model, seed=3407)
    wide = math.sqrt(2 / (5 * 256))
    into_residual = 1 / (math.sqrt(256) * 3)
    for name, weight in model.named_parameters():
        if weight.dim() == 1:
            assert torch.equal(weight, torch.ones_like(weight)), name
            continue
        std = into_residual if name.endswith(("attn.proj.weight", "mlp.down.weight")) else wide
        samples = weight.numel()
        assert abs(weight.mean()) < 5 * std / math.sqrt(samples), name  # 5 standard errors
        assert abs(weight.std() / std - 1) < 5 / math.sqrt(2 * samples), name

    with torch.device("meta"):
        from_meta = GPT(config)
    from_meta.to_empty(device="cpu")
    torch.manual_seed(123)  # the global generator plays no part
    initialize(from_meta, seed=3407)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), from_meta.parameters(), strict=True))
    initialize(from_meta, seed=3408)
    assert not torch.equal(model.lm_head.weight, from_meta.lm_head.weight)


def test_initial_weights_differ_between_layers() -> None:
    model = make("full")
    first, second = (model.transformer.h[i].attn.qkv.weight for i in range(2))
    assert not torch.equal(first, second)


def test_the_room_gives_the_model_and_nothing_else() -> None:
    assert lit_gpt.model.GPT is GPT
    with pytest.raises(AttributeError, match="has no attribute 'initialise'"):
        _ = lit_gpt.model.initialise
