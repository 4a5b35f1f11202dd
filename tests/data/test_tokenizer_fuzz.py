"""Damaged tokenizer folders give the right ids or one line, in bounded time and memory."""

from __future__ import annotations

import copy
import json
import random
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers

from lit_gpt.cli import BadInput
from lit_gpt.data.tokenizer import Tokenizer
from tests.support.odd_tokenizers import CONFIG, added, bpe, rules, sentencepiece_model, unigram, write
from tests.support.small_tokenizer import write_byte_level

TEXTS = ["ab", " a  b ", "a/b" * 9, "\n\ta\r\n", "ä 🐑", "a" * 700]
ODD: list[Any] = [
    None, True, False, 0, 1, -1, 2, 0.5, 1 << 31, 1 << 40, "", "a", "</s>", "\0", "x" * 5000, "(a+)+$", "\ud800", [],
    {}, [["a", "b"]], {"a": 1}, {"type": "Sequence"}, {"Regex": "(a|b)*c"}, {"String": ""},
    {"type": "FixedLength", "length": 0}, {"type": "ByteLevel"}, {"type": "Metaspace", "replacement": "▁"},
    {"type": "Replace", "pattern": {"String": ""}, "content": "aa"},
    {"type": "Precompiled", "precompiled_charsmap": "AA"},
    {"direction": "Left", "max_length": 3, "strategy": "LongestFirst", "stride": 1},
]  # fmt: skip


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Folders with a BPE, a Unigram model, a byte-level BPE, and two sentencepiece models."""
    base = tmp_path_factory.mktemp("whole")
    folders = [
        write(base / "bpe", rules(bpe(), added_tokens=[added(2, "</s>"), added(12, "T", special=False)])),
        write(base / "unigram", rules(unigram(), pre_tokenizer={"type": "WhitespaceSplit"})),
        write_byte_level(base / "bytes", ["ab aab </s> b"] * 9),
    ]
    for name, options in (("sp", {}), ("sp bytes", {"byte_fallback": True, "vocab_size": 330})):
        (base / name).mkdir()
        (base / name / "tokenizer.model").write_bytes(sentencepiece_model(**options))
        (base / name / "tokenizer_config.json").write_text(json.dumps(CONFIG))
        folders.append(base / name)
    return folders


def edited(content: bytes, choice: random.Random) -> bytes:
    """JSON with a few of its values replaced, removed or exchanged."""
    root = json.loads(content)
    for _ in range(choice.choice([1, 1, 2, 4])):
        node = root
        while isinstance(node, dict | list) and node:
            key = choice.choice(list(node) if isinstance(node, dict) else range(len(node)))
            if not isinstance(node[key], dict | list) or not node[key] or choice.random() < 0.3:
                action = choice.random()
                if action < 0.2:
                    del node[key]
                else:
                    other = choice.choice(list(node) if isinstance(node, dict) else range(len(node)))
                    node[key] = copy.deepcopy(choice.choice(ODD) if action < 0.8 else node[other])
                break
            node = node[key]
    return json.dumps(root).encode()


def flipped(content: bytes, choice: random.Random) -> bytes:
    damaged = bytearray(content)
    for _ in range(choice.choice([1, 1, 4, 20])):
        damaged[choice.randrange(len(damaged))] = choice.randrange(256)
    return bytes(damaged)


def cut(content: bytes, choice: random.Random) -> bytes:
    return content[: choice.randrange(len(content))]


def as_the_library_says(folder: Path) -> Callable[[str], list[int]]:
    """The ids that the libraries themselves give for a text, without truncation, padding and dropout."""
    if not (folder / "tokenizer.json").exists():
        model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        return lambda text: model.encode(text)
    content = json.loads((folder / "tokenizer.json").read_bytes())
    content |= {"truncation": None, "padding": None, "post_processor": None}
    content["model"].pop("dropout", None)
    for token in content.get("added_tokens", []):
        token["lstrip"] = token["rstrip"] = False
    backend = tokenizers.Tokenizer.from_str(json.dumps(content))
    backend.encode_special_tokens = True
    return lambda text: backend.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("seeds", [range(60), pytest.param(range(60, 3000), marks=pytest.mark.long)])
@pytest.mark.timeout(600)
def test_right_ids_or_one_line(
    sources: list[Path], tmp_path: Path, capfd: pytest.CaptureFixture[str], seeds: range
) -> None:
    loaded = 0
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in seeds:
        choice = random.Random(seed)
        source, folder = sources[seed % len(sources)], tmp_path / str(seed)
        folder.mkdir()
        for path in source.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        path = choice.choice(sorted(folder.iterdir()))
        damage = [flipped, cut] if path.suffix == ".model" else [edited, edited, edited, flipped, cut]
        path.write_bytes(choice.choice(damage)(path.read_bytes(), choice))
        try:
            tokenizer = Tokenizer.from_folder(folder)
        except BadInput:
            continue
        finally:
            assert "panicked" not in capfd.readouterr().err, seed
        loaded += 1
        control = {tokenizer.bos_id, tokenizer.eos_id}
        ids = tokenizer.encode_batch([*TEXTS, "a</s><s>b"])
        assert not control & {id for text_ids in ids for id in text_ids}, seed
        library = as_the_library_says(folder)
        for text, text_ids in zip(TEXTS, ids, strict=False):
            assert library(text) == text_ids, (seed, text)
    assert loaded > len(seeds) / 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 500_000  # KiB
