"""Small tokenizer folders with rules of any kind, and small sentencepiece models."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

PIECES = ["<unk>", "<s>", "</s>", "a", "b", "<", "/", "s", ">", " ", "</", "s>"]
CONFIG: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>"}


def added(id: int, content: str, *, special: bool = True, **flags: bool) -> dict[str, Any]:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": id, "content": content, **plain, "special": special, **flags}


def bpe(**changes: Any) -> dict[str, Any]:
    """A BPE over characters in which the text "</s>" merges to the ids 10 and 11."""
    return {
        "type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": False, "ignore_merges": False,
        "vocab": {piece: id for id, piece in enumerate(PIECES)}, "merges": [["<", "/"], ["s", ">"]], **changes,
    }  # fmt: skip


def unigram(**changes: Any) -> dict[str, Any]:
    """A Unigram model over the same characters; as in sentencepiece, control pieces have the best score, 0."""
    vocab = [[piece, 0.0 if id < 3 else -3.0] for id, piece in enumerate(PIECES[:10])]
    return {"type": "Unigram", "unk_id": 0, "byte_fallback": False, "vocab": vocab, **changes}


def rules(model: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A tokenizer.json."""
    parts = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"))
    return {"version": "1.0", **parts, "added_tokens": [added(2, "</s>")], "model": model, **changes}


def write(folder: Path, rules: dict[str, Any], config: dict[str, Any] = CONFIG) -> Path:
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(rules, indent=2, ensure_ascii=False), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def sentencepiece_model(**options: Any) -> bytes:
    """A BPE model of sentencepiece that leaves the text as it is, unless `options` say otherwise."""
    import sentencepiece

    llama: dict[str, Any] = {
        "model_type": "bpe", "vocab_size": 120, "normalization_rule_name": "identity", "remove_extra_whitespaces": False
    }  # fmt: skip
    sentences = ["der bär läuft über die straße und grüßt alle"] * 50 + ["ein haus am see  mit allen 123"] * 40
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_writer=model, minloglevel=2, hard_vocab_limit=False, **llama | options
    )
    return model.getvalue()
