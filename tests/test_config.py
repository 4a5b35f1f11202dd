"""The registry: shapes and parameter counts are those of the published models, exactly."""

from __future__ import annotations

import pytest
import torch

from lit_gpt.cli import BadInput
from lit_gpt.config import REGISTRY, Config
from lit_gpt.model.gpt import GPT

PUBLISHED = {
    "LLaMmlein_120M": (12, 12, 4, 768, 2048, 124_766_976),
    "LLaMmlein_1B": (22, 32, 4, 2048, 5632, 1_100_310_528),
    "LLaMmlein_7B": (32, 32, 32, 4096, 11008, 6_738_939_904),
    "tiny_LLaMA_120M": (12, 12, 4, 768, 2048, 124_766_976),
    "tiny_LLaMA_1b": (22, 32, 4, 2048, 5632, 1_100_310_528),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_shapes(name: str) -> None:
    c = Config.from_name(name)
    shape = (c.n_layer, c.n_head, c.n_query_groups, c.n_embd, c.intermediate_size, c.parameters)
    assert shape == PUBLISHED[name]
    assert (c.block_size, c.padded_vocab_size, c.norm_eps, c.rope_base) == (2048, 32_064, 1e-5, 10_000)


@pytest.mark.parametrize("name", REGISTRY)
def test_parameters_are_those_of_the_model(name: str) -> None:
    config = Config.from_name(name)
    with torch.device("meta"):
        model = GPT(config)
    assert sum(p.numel() for p in model.parameters()) == config.parameters


def test_debug_is_small() -> None:
    assert 1_000_000 <= Config.from_name("debug").parameters <= 3_000_000


def test_unknown_names_list_the_valid_ones() -> None:
    with pytest.raises(BadInput, match=r"LLaMmlein_1B.*LLaMmlein_7B.*debug"):
        Config.from_name("LLaMmlein_2B")
    with pytest.raises(BadInput, match=r"did you mean LLaMmlein_120M"):
        Config.from_name("llammlein_120M")
    with pytest.raises(BadInput, match=r"n_layers.*n_layer"):
        Config.from_name("debug", n_layers=2)


@pytest.mark.parametrize(("field", "value"), [("n_layer", 0), ("n_head", 3), ("n_query_groups", 3), ("vocab_size", 0)])
def test_impossible_shapes_are_refused(field: str, value: int) -> None:
    with pytest.raises(BadInput, match=f"{field}|n_head"):
        Config.from_name("debug", **{field: value})


def test_vocabulary() -> None:
    assert Config.from_name("debug").with_vocabulary(32_010).padded_vocab_size == 32_064
    assert Config.from_name("LLaMmlein_1B").with_vocabulary(32_010) == Config.from_name("LLaMmlein_1B")
    with pytest.raises(BadInput, match="vocabulary of 5000"):
        Config.from_name("LLaMmlein_1B").with_vocabulary(5000)
    assert Config.from_name("LLaMmlein_1B", vocab_size=5000).with_vocabulary(5000).padded_vocab_size == 5056


def test_flops_rules_reproduce_tinyllama() -> None:
    """24,000 tokens/s of the 1.1B shape on an A100 (312 TFLOP/s) is the 56.3 % that TinyLlama states."""
    config = Config.from_name("tiny_LLaMA_1b")
    assert round(24_000 * config.flops_per_token(with_embedding=False) / 312e12, 3) == 0.563
    # 6 x 1,100,310,528 + 12 x 22 x 2048 x 2048
    assert config.flops_per_token(with_embedding=True) == 6_601_863_168 + 1_107_296_256
