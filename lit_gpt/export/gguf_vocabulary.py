"""A tokenizer in the fields of a GGUF file, as llama.cpp reads them.

llama.cpp's LLaMA has two kinds of BPE. For BPE over characters ("llama", as sentencepiece makes it), the merge order
becomes scores: llama.cpp merges any two neighbours that make a token, the highest score first, and stops at a character
that the vocabulary lacks, where training saw <unk>. For BPE over bytes ("gpt2"), the first split must be one that
llama.cpp has a name for: the first that gives our ids on the probes. Nothing here says that llama.cpp gives our ids:
gguf_proof.py does.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import tokenizers

from lit_gpt.cli import BadInput
from lit_gpt.data.tokenizer import Tokenizer
from lit_gpt.export.hf_tokenizer import chat_template
from lit_gpt.files import read_json

log = logging.getLogger(__name__)


class Split(NamedTuple):
    """A first split that llama.cpp has a name for (src/llama-vocab.cpp)."""

    regex: str
    ignore_merges: bool = False
    """Whether a whole piece that is a token stays whole, even if no merges lead to it."""
    since: str = ""
    """For a name that not every llama.cpp in use knows: when it came."""


_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_ENGLISH = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {
    "qwen2": Split(rf"{_ENGLISH}|{_WORDS}|\p{{N}}|{_REST}"),
    "ufakzeka": Split(rf"{_WORDS}|\p{{N}}|{_REST}", since="September 2026"),
    "llama-bpe": Split(rf"{_ENGLISH}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}", ignore_merges=True),
    "gpt-2": Split(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"),
}
"""In the order of preference. A split may leave pieces whole that ours cuts, where no merge crosses the cut. qwen2, the
most similar to ours that every llama.cpp knows, cuts where ours does not: after an apostrophe and a word's beginning
that looks like an English contraction (Grimm'sche, Ku'damm). ufakzeka is qwen2 without these."""


def add_vocabulary(
    writer: Any, gguf: ModuleType, folder: Path, tokenizer: Tokenizer, rows: int, probes: Sequence[str]
) -> None:
    """Write the fields of the tokenizer in `folder` for a model of `rows` ids; BadInput if llama.cpp cannot have it."""
    rules = tokenizer.rules()
    if rules["model"]["type"] != "BPE":
        raise BadInput(f"{folder}: a LLaMA of llama.cpp has a BPE tokenizer, this one is {rules['model']['type']}")
    _require_in_vocabulary(folder, tokenizer, rows)
    ids = rules["model"]["vocab"] | {token["content"]: token["id"] for token in rules["added_tokens"]}
    texts = {id: text for text, id in ids.items()}
    types = dict.fromkeys(range(rows), gguf.TokenType.UNUSED) | dict.fromkeys(ids.values(), gguf.TokenType.NORMAL)
    for token in rules["added_tokens"]:
        types[token["id"]] = gguf.TokenType.CONTROL if token["special"] else gguf.TokenType.USER_DEFINED
    unknown = ids.get(rules["model"]["unk_token"])
    if unknown is not None:
        types[unknown] = gguf.TokenType.UNKNOWN
        writer.add_unk_token_id(unknown)
    if is_over_bytes(rules):
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(split_name(rules, probes))
        writer.add_token_merges([" ".join(_pair(merge)) for merge in rules["model"]["merges"]])
    else:
        writer.add_tokenizer_model("llama")
        for id, text in texts.items():
            if text.startswith("<0x") and len(text) == len("<0x00>"):
                types[id] = gguf.TokenType.BYTE
        writer.add_token_scores(list(_scores(rules, rows)))
        writer.add_add_space_prefix(_begins_with_space(tokenizer, texts))
    writer.add_token_list([texts.get(id, f"[unused {id}]") for id in range(rows)])
    writer.add_token_types([types[id] for id in range(rows)])
    if tokenizer.bos_id is not None:
        writer.add_bos_token_id(tokenizer.bos_id)
    writer.add_eos_token_id(tokenizer.eos_id)
    writer.add_pad_token_id(tokenizer.eos_id)
    writer.add_add_bos_token(adds_bos(folder))
    if (template := chat_template(folder)) is not None:
        writer.add_chat_template(template)


def adds_bos(folder: Path) -> bool:
    """Whether a text begins with BOS, as the export wrote it."""
    return bool(read_json(folder / "tokenizer_config.json").get("add_bos_token", False))


def is_over_bytes(rules: dict[str, Any]) -> bool:
    """Whether the BPE of a tokenizer.json is over bytes, not over characters."""
    return '"ByteLevel"' in json.dumps([rules["normalizer"], rules["pre_tokenizer"]])


def split_name(rules: dict[str, Any], probes: Sequence[str]) -> str:
    """llama.cpp's name for a first split that gives the ids of `rules` (a byte-level tokenizer.json) on the probes.

    Raises BadInput if there is none.
    """
    expected = _ids(rules, probes)
    for name, split in SPLITS.items():
        if _ids(rules | with_split(rules, split), probes) == expected:
            if split.since:
                log.warning("the file needs a llama.cpp of %s or later: its pre-tokenizer is %r", split.since, name)
            return name
    raise BadInput(f"llama.cpp has no first split that gives this tokenizer's ids: tried {', '.join(SPLITS)}")


def with_split(rules: dict[str, Any], split: Split) -> dict[str, Any]:
    """The changes of `rules` that make it a tokenizer with llama.cpp's split."""
    first = {"type": "Split", "pattern": {"Regex": split.regex}, "behavior": "Isolated", "invert": False}
    to_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [first, to_bytes]},
        "model": rules["model"] | {"ignore_merges": split.ignore_merges},
    }


def _ids(rules: dict[str, Any], texts: Sequence[str]) -> list[list[int]]:
    backend = tokenizers.Tokenizer.from_str(json.dumps(rules))
    backend.encode_special_tokens = True
    return [encoding.ids for encoding in backend.encode_batch(texts, add_special_tokens=False)]


def _require_in_vocabulary(folder: Path, tokenizer: Tokenizer, rows: int) -> None:
    """Raise BadInput if a token, or an end of text that config.json names, has no row in the model's matrices."""
    if tokenizer.vocab_size > rows:
        raise BadInput(f"{folder}: its tokenizer has {tokenizer.vocab_size} ids, its model {rows}")
    for name in ("config.json", "generation_config.json"):
        fields = read_json(folder / name) if (folder / name).is_file() else {}
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = fields.get(key)
            for id in value if isinstance(value, list) else [value]:
                if id is not None and (not isinstance(id, int) or not 0 <= id < rows):
                    raise BadInput(f"{folder / name}: {key} is {value!r}, but the model has ids 0 to {rows - 1}")


def _begins_with_space(tokenizer: Tokenizer, texts: dict[int, str]) -> bool:
    ids = tokenizer.encode("e")
    return bool(ids) and texts[ids[0]].startswith("▁")


def _pair(merge: str | list[str]) -> tuple[str, str]:
    """A merge in tokenizer.json's older form, "a b", or newer form, ["a", "b"]."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _scores(rules: dict[str, Any], rows: int) -> Iterator[float]:
    """Each id's score: minus the rank of the token's first merge."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(rules["model"]["merges"]):
        ranks.setdefault("".join(_pair(merge)), rank)
    by_id = {id: -float(ranks.get(text, len(ranks))) for text, id in rules["model"]["vocab"].items()}
    return (by_id.get(id, 0.0) for id in range(rows))
