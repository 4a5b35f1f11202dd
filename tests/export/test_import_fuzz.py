"""Damaged folders and iter-*.pth of others: the values that the libraries read, or one line, in bounded memory."""

from __future__ import annotations

import json
import os
import random
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lit_gpt.cli import BadInput
from lit_gpt.config import Config
from lit_gpt.export.hf_folder import HFWeights
from lit_gpt.export.hf_weights import config_from_hf, hf_config
from lit_gpt.export.legacy import LegacyState
from lit_gpt.files import read_json
from tests.export.test_hf_folder import TENSORS
from tests.export.test_legacy import hf_model, published
from tests.support.mutations import mutated

SEEDS = [range(25), pytest.param(range(25, 600), marks=pytest.mark.long)]
CONFIG = hf_config(Config.from_name("debug"), dtype=torch.float32, vocabulary_rows=4096, bos_id=1, eos_id=2)
ODD: list[Any] = [
    True, 0, -1, 1 << 40, 0.5, float("nan"), float("inf"), "", "4", [], [4], {}, {"type": "yarn"}, {"rope_theta": "x"},
]  # fmt: skip


def memory_kib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def refused(read: Callable[[], object]) -> bool:
    try:
        read()
    except BadInput as error:
        return "\n" not in str(error)
    return False


@pytest.mark.parametrize("seeds", SEEDS)
@pytest.mark.parametrize("form", ["safetensors", "bin", "old bin"])
@pytest.mark.timeout(600)
def test_weights(tmp_path: Path, form: str, seeds: range) -> None:
    path = tmp_path / ("model.safetensors" if form == "safetensors" else "pytorch_model.bin")
    if form == "safetensors":
        save_file(TENSORS, path)
    else:
        torch.save(TENSORS, path, _use_new_zipfile_serialization=form == "bin")
    whole, before, taken = path.read_bytes(), memory_kib(), 0
    for seed in seeds:
        path.write_bytes(mutated(whole, random.Random(seed)))
        found: dict[str, torch.Tensor] = {}

        def read(found: dict[str, torch.Tensor] = found) -> None:
            weights = HFWeights(tmp_path)
            assert weights.dtype in (torch.float32, torch.float16, torch.bfloat16)
            found.update({name: weights.read(name).clone() for name in weights.names})

        if not refused(read):
            taken += 1
            library = load_file(path) if form == "safetensors" else torch.load(path, weights_only=True)
            assert found.keys() == library.keys()
            assert all(torch.equal(found[name], library[name]) for name in found), seed
    assert taken < len(seeds)
    assert memory_kib() - before < 200_000


@pytest.mark.parametrize("seeds", SEEDS)
@pytest.mark.timeout(600)
def test_config(tmp_path: Path, seeds: range) -> None:
    path = tmp_path / "config.json"
    for seed in seeds:
        choice, fields = random.Random(seed), dict(CONFIG)
        for _ in range(choice.choice([1, 1, 3])):
            fields[choice.choice([*CONFIG, "rope_parameters"])] = choice.choice(ODD)
        content = json.dumps(fields).encode()
        path.write_bytes(mutated(content, choice) if seed % 2 else content)
        kept: list[Config] = []

        def read(kept: list[Config] = kept) -> None:
            kept.append(config_from_hf(read_json(path), model_name=None, vocab_size=4096))

        if not refused(read):
            same = ("n_layer", "n_head", "n_query_groups", "n_embd", "intermediate_size", "vocab_size")
            assert all(getattr(kept[0], name) == getattr(Config.from_name("debug"), name) for name in same), seed
            assert 1 <= kept[0].block_size <= 1 << 24, seed


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("max_position_embeddings", 1 << 40), ("num_attention_heads", 0), ("hidden_size", "128"), ("vocab_size", True),
        ("rms_norm_eps", "1e-5"), ("rope_scaling", "linear"), ("rope_theta", -1), ("rope_parameters", [1]),
    ],
)  # fmt: skip
def test_an_odd_value_is_named(key: str, value: object) -> None:
    with pytest.raises(BadInput, match=rf"^config\.json: {key} is "):
        config_from_hf({**CONFIG, key: value}, model_name=None, vocab_size=4096)


@pytest.mark.slow
@pytest.mark.parametrize("seeds", SEEDS)
@pytest.mark.timeout(600)
def test_published_states(tmp_path: Path, seeds: range) -> None:
    path = tmp_path / "iter.pth"
    torch.save(published(hf_model(), swiglu=True), path)
    whole, before = path.read_bytes(), memory_kib()

    def read() -> None:
        state = LegacyState(path)
        for _ in state.tensors(state.config(None, None)):
            pass

    assert not refused(read)
    damaged = 0
    for seed in seeds:
        content = mutated(whole, random.Random(seed))
        path.write_bytes(content)
        damaged += refused(read)
    assert damaged > len(seeds) / 2
    assert memory_kib() - before < 300_000


@pytest.mark.parametrize("make", [lambda p: os.mkfifo(p), lambda p: p.write_text("[" * 10**6), lambda p: p.mkdir()])
def test_json_that_is_none_is_one_line(tmp_path: Path, make: Callable[[Path], object]) -> None:
    make(tmp_path / "config.json")
    assert refused(lambda: read_json(tmp_path / "config.json"))


def test_giant_json_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(1 << 34)
    with pytest.raises(BadInput, match="17,179,869,184 bytes; at most"):
        read_json(tmp_path / "config.json")
