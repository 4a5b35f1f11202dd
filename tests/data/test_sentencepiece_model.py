"""A sentencepiece model alone gives the ids of the sentencepiece library, or is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from lit_gpt.cli import BadInput
from lit_gpt.data.tokenizer import Tokenizer
from tests.support.odd_tokenizers import sentencepiece_model

TEXTS = [
    "der bär läuft", " ein haus", "  zwei", "am see  mit allen", "ende ", "\n\nzeile\t", "</s> <unk> <c>haus<x>",
    "▁der", "", " ", "🐑 e\u0301", "ＡＢ ﬁ", "<0x0A>",
]  # fmt: skip


def folder(path: Path, model: bytes, config: dict[str, Any] | None = None, added: dict[str, int] | None = None) -> Path:
    path.mkdir()
    (path / "tokenizer.model").write_bytes(model)
    for name, content in (("tokenizer_config", config), ("added_tokens", added)):
        if content is not None:
            (path / f"{name}.json").write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"byte_fallback": True, "vocab_size": 350},
        {"add_dummy_prefix": False},
        {"add_dummy_prefix": False, "user_defined_symbols": ["<x>", "haus"]},
        {"control_symbols": ["<c>", "haus"]},
        {"split_by_whitespace": False},
        {"unk_id": 3, "bos_id": 0, "eos_id": 1, "pad_id": 2},
        {"unk_piece": "[UNK]", "eos_piece": "[E]", "bos_piece": "[B]"},
    ],
)
def test_same_ids_as_sentencepiece(tmp_path: Path, options: dict[str, Any]) -> None:
    model = sentencepiece_model(**options)
    reference = sentencepiece.SentencePieceProcessor(model_proto=model)
    tokenizer = Tokenizer.from_folder(folder(tmp_path / "t", model))
    assert tokenizer.encode_batch(TEXTS) == reference.encode(TEXTS)
    expected = (reference.vocab_size(), reference.bos_id(), reference.eos_id())
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"normalization_rule_name": "nmt_nfkc"}, r"rewrites texts before it splits them \(nmt_nfkc\)"),
        ({"remove_extra_whitespaces": True}, r"the ids \[\] in sentencepiece"),
        ({"treat_whitespace_as_suffix": True}, "in sentencepiece"),
        ({"user_defined_symbols": ["<x>"]}, "in sentencepiece"),
        ({"model_type": "unigram", "vocab_size": 50}, "not a BPE model"),
        ({"model_type": "char"}, "not a BPE model"),
        ({"eos_id": -1}, "names no eos_token"),
    ],
)
def test_models_with_other_ids_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        Tokenizer.from_folder(folder(tmp_path / "t", sentencepiece_model(**options)))


def test_the_published_model_alone_rewrites_texts(shared: Path, tmp_path: Path) -> None:
    """Its models were trained without that; only the folder's other files say so."""
    with pytest.raises(BadInput, match="rewrites texts"):
        Tokenizer.from_folder(folder(tmp_path / "t", (shared / "tokenizer/tokenizer.model").read_bytes()))


def test_sampling_that_the_settings_ask_for_is_not_done(tmp_path: Path) -> None:
    model = sentencepiece_model()
    sampling = {"sp_model_kwargs": {"enable_sampling": True, "nbest_size": -1, "alpha": 0.1}}
    tokenizer = Tokenizer.from_folder(folder(tmp_path / "t", model, sampling))
    expected = sentencepiece.SentencePieceProcessor(model_proto=model).encode(TEXTS)
    assert [tokenizer.encode_batch(TEXTS) for _ in range(3)] == [expected] * 3


def test_a_space_before_the_text_only_where_the_settings_ask(tmp_path: Path) -> None:
    model = sentencepiece_model()
    reference = sentencepiece.SentencePieceProcessor(model_proto=model)
    bare = Tokenizer.from_folder(folder(tmp_path / "a", model, {"legacy": False, "add_prefix_space": False}))
    assert bare.encode(" der bär") == reference.encode("der bär")
    assert bare.decode(bare.encode(" der")) == " der"


def test_added_tokens_beside_a_model(tmp_path: Path) -> None:
    """transformers' legacy rules put a space before each part of a text; its later rules are told by tokenizer.json."""
    model = sentencepiece_model()
    reference = sentencepiece.SentencePieceProcessor(model_proto=model)
    new = {"<neu>": reference.vocab_size()}
    tokenizer = Tokenizer.from_folder(folder(tmp_path / "a", model, {}, new))
    expected = [*reference.encode("der"), new["<neu>"], *reference.encode("bär")]
    assert tokenizer.encode("der<neu>bär") == expected
    with pytest.raises(BadInput, match="legacy=false"):
        Tokenizer.from_folder(folder(tmp_path / "b", model, {"legacy": False}, new))
    with pytest.raises(BadInput, match="cannot have the id 7"):
        Tokenizer.from_folder(folder(tmp_path / "c", model, {}, {"<neu>": 7}))
