"""The rules of a tokenizer, as tokenizer.json states them: what they may not say, and which tokens are control tokens.

Invariants: state that belongs to one call (truncation, padding, BPE dropout) is off; a control token is reached by its
id only, never by a text that spells it out. Where the folder's rules would do otherwise, they are changed for encoding;
decoding and export keep the names.
"""

from __future__ import annotations

import copy
import json
import re
import secrets
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import tokenizers

from lit_gpt.cli import BadInput

Rules = dict[str, Any]
"""The content of a tokenizer.json as the `tokenizers` library writes it."""

NAMED = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
"""Keys of tokenizer_config.json and special_tokens_map.json that name one control token."""
LISTED = ("additional_special_tokens", "extra_special_tokens")
"""Keys that list control tokens, or map names to them."""

LARGEST_GROWTH = 10_000
"""A bound for rules that replace a character by a longer text, many times over."""

_CUT_BYTE_PIECES = {
    "type": "Split", "pattern": {"Regex": "<(?=0x[0-9A-F]{2}>)"}, "behavior": "MergedWithPrevious", "invert": False
}  # fmt: skip

PLAIN_TEXTS = (
    "", " ", "  ", "\n", "\n\n", "\t", "\r\n", "\0", "a", " a", "a ", "  a  b  ", "\n a", "a\n\nb\n", "\ta\t", "A b C",
    "Straße, Größe, ÄÖÜäöüß – „Anführung“ … €", "Donaudampfschifffahrtsgesellschaft", "1234567890 3,14159 ½ ²",
    "e\u0301 u\u0308", "\u0301", "🐑🏳️\u200d🌈 漢字", "\u200b\u200d\ufeff\u2060", "\u0085\u00a0\u2028\u3000", "\u00ad",
    "ﬁ ＡＢ ① ㎏", "▁", "▁a ▁", " ▁ ", "Ġ Ċ ##ab</w>", "<0x0A><0x41>", "<|x|> [Y] <z>", "<\\^`{}~ $PATH", "\U0010ffff",
    "a" * 2000, "ab" * 999, " " * 200, "\n" * 200, "-" * 500, "ß" * 500, "🐑" * 200,
)  # fmt: skip
"""Texts without a control token, where tokenizers are known to fail or to differ."""


class ControlTokens(NamedTuple):
    ids: dict[str, int]
    """Every control token's id, by its text."""
    unknown: str | None
    """The token for characters that the vocabulary lacks: the one that plain text may give."""


# What belongs to one call


def without_call_state(content: bytes, backend: tokenizers.Tokenizer) -> tuple[bytes, list[str]]:
    """tokenizer.json without truncation, padding and BPE dropout, and what was taken out, in words.

    `backend` is what `content` gave. Nothing but the values becomes null, so that the bytes are those of the same file
    saved before a call left its state there.
    """
    found: dict[str, Any] = {
        "truncation": backend.truncation and f"truncation to {backend.truncation['max_length']} ids",
        "padding": backend.padding and "padding",
        "dropout": getattr(backend.model, "dropout", None) and f"BPE dropout {backend.model.dropout:g}",
    }
    found = {key: words for key, words in found.items() if words}
    if not found:
        return content, []
    rules = json.loads(content)
    text = content.decode()
    for key in found:
        (rules["model"] if key == "dropout" else rules)[key] = None
        text = _with_null(text, key)
    if json.loads(text) != rules:  # the same key elsewhere: written anew
        text = json.dumps(rules, ensure_ascii=False)
    return text.encode(), list(found.values())


def _with_null(text: str, key: str) -> str:
    start = re.search(rf'"{key}"\s*:\s*', text).end()  # type: ignore[union-attr]
    _, end = json.JSONDecoder().raw_decode(text, start)
    return f"{text[:start]}null{text[end:]}"


def without_stripping(rules: Rules) -> list[str]:
    """Let no added token swallow the spaces beside it (lstrip, rstrip), in place; returns the tokens that did.

    Control tokens are found in no text, so their flags mean nothing.
    """
    found = [token for token in rules["added_tokens"] if not token["special"] and (token["lstrip"] or token["rstrip"])]
    for token in found:
        token["lstrip"] = token["rstrip"] = False
    return [token["content"] for token in found]


# Control tokens


def named_tokens(config: dict[str, Any]) -> Iterator[str]:
    """The texts of all control tokens that tokenizer_config.json and special_tokens_map.json name."""
    values: list[Any] = [config.get(name) for name in NAMED]
    for name in LISTED:
        listed = config.get(name)
        values += listed.values() if isinstance(listed, dict) else listed if isinstance(listed, list) else []
    decoder = config.get("added_tokens_decoder")
    if isinstance(decoder, dict):
        values += [token for token in decoder.values() if isinstance(token, dict) and token.get("special") is True]
    for value in values:
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str) and text:
            yield text


def mark_control_tokens(rules: Rules, named: Iterable[str]) -> ControlTokens:
    """Make every named token of the vocabulary an added token that is special, in place; returns all special tokens."""
    vocabulary = dict(pieces(rules["model"]))
    added = {token["content"]: token for token in rules["added_tokens"]}
    for text in named:
        if text in added:
            added[text]["special"] = True
        elif text in vocabulary:
            flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
            added[text] = {"id": vocabulary[text], "content": text, **flags}
    rules["added_tokens"] = sorted(added.values(), key=lambda token: token["id"])
    model = rules["model"]
    unknown = model.get("unk_token")
    if model["type"] == "Unigram" and model["unk_id"] is not None:
        unknown = model["vocab"][model["unk_id"]][0]
    return ControlTokens({text: token["id"] for text, token in added.items() if token["special"]}, unknown)


def pieces(model: dict[str, Any]) -> Iterator[tuple[str, int]]:
    """The model's own tokens with their ids."""
    if model["type"] == "Unigram":
        return ((piece, id) for id, (piece, _) in enumerate(model["vocab"]))
    return iter(model["vocab"].items())


def require_sound_ids(backend: tokenizers.Tokenizer, content: bytes) -> None:
    """Raise BadInput unless each id has one token, few ids are unused, and added tokens have the ids that a file says.

    `content` is the tokenizer.json of `backend`, or empty.
    """
    owners: dict[int, str] = {}
    for text, id in backend.get_vocab(with_added_tokens=True).items():
        if owners.setdefault(id, text) != text:
            raise BadInput(f"tokens {owners[id]!r} and {text!r} share the id {id}")
    if not owners or max(owners) > 2 * len(owners) + 4096:
        raise BadInput(
            f"{len(owners)} tokens have ids up to {max(owners, default=0)}: a model would get a row for each"
        )
    text = content.decode()
    if listed := re.search(r'"added_tokens"\s*:\s*(?=\[)', text):
        for token in json.JSONDecoder().raw_decode(text, listed.end())[0]:
            if backend.token_to_id(token["content"]) != token["id"]:
                raise BadInput(f"added token {token['content']!r} cannot have the id {token['id']}")


def require_bounded(*parts: dict[str, Any]) -> None:
    """Raise BadInput if a normalizer or decoder could make a text very much longer."""
    for part in parts:
        if _growth(part) > LARGEST_GROWTH:
            raise BadInput(f"its {part['type']} rules could make a text {_growth(part):.0g} times as long")


def _growth(part: dict[str, Any]) -> float:
    added = len(part.get("content") or "") if part.get("type") == "Replace" else len(part.get("prepend") or "")
    growth = max(1, added / max(1, len((part.get("pattern") or {}).get("String", ""))))
    for inner in part.get("normalizers") or part.get("decoders") or ():
        growth *= _growth(inner)
    return growth


def unreachable(rules: Rules, control: ControlTokens) -> Rules | None:
    """Rules that give the same ids, except that no text gives a control token or a byte piece by spelling it out.

    None if the rules are so already. Where the model itself could make a control token of a text's characters, that
    token gets a random name, which no text holds, and the merges that lead to it go.
    """
    model = rules["model"]
    byte_pieces = {f"<0x{byte:02X}>" for byte in range(256)} if model.get("byte_fallback") else set()
    spelled = _spelled_by_text(model, {*control.ids, *filter(None, [control.unknown]), *byte_pieces})
    bytes_spelled = spelled & byte_pieces
    for text in (spelled := spelled - bytes_spelled | bytes_spelled & control.ids.keys()):
        if text != control.unknown and (len(text) == 1 or text in byte_pieces):
            raise BadInput(f"control token {text!r} is what texts are made of: no text could hold it any more")
    changed = rules | {"model": model.copy(), "added_tokens": copy.deepcopy(rules["added_tokens"])}
    if spelled:
        _rename(changed, {text: f"{secrets.token_hex(16)} {number}" for number, text in enumerate(sorted(spelled))})
    if bytes_spelled:
        before = changed["pre_tokenizer"]
        changed["pre_tokenizer"] = {
            "type": "Sequence", "pretokenizers": [*([before] if before else []), _CUT_BYTE_PIECES]
        }  # fmt: skip
    return changed if spelled or bytes_spelled else None


def _spelled_by_text(model: dict[str, Any], texts: set[str]) -> set[str]:
    """Those of `texts` that the model could make of a text's characters."""
    own = {piece for piece, _ in pieces(model)} & texts
    if model["type"] != "BPE" or model["ignore_merges"]:
        return own
    if model["continuing_subword_prefix"] or model["end_of_word_suffix"]:
        return own
    merged = {left + right for left, right in model["merges"]}
    return {piece for piece in own if len(piece) == 1 or piece in merged}


def _rename(rules: Rules, names: dict[str, str]) -> None:
    model = rules["model"]
    if model["type"] == "Unigram":
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
    else:
        model["vocab"] = {names.get(piece, piece): id for piece, id in model["vocab"].items()}
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    if model["type"] == "BPE":
        prefix = len(model["continuing_subword_prefix"] or "")
        model["merges"] = [
            [left, right]
            for left, right in model["merges"]
            if not {left, right, left + right, left + right[prefix:]} & names.keys()
        ]
    for token in rules["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])


# Proof


def lost_character(rules: Rules) -> str | None:
    """A character of the plain texts that these rules would leave out of a text without a trace; None if there is none.

    A BPE model without an unknown token does so with what neither its vocabulary nor its bytes hold. Characters that
    cannot be seen do not count, but for white space.
    """
    model = rules["model"]
    if model["type"] != "BPE" or model["unk_token"] is not None:
        return None
    unknown = secrets.token_hex(16)
    free = 1 + max(model["vocab"].values(), default=-1)
    told = tokenizers.Tokenizer.from_str(
        json.dumps(rules | {"model": model | {"vocab": model["vocab"] | {unknown: free}, "unk_token": unknown}})
    )
    told.encode_special_tokens = True
    every = dict.fromkeys(
        letter for text in PLAIN_TEXTS for letter in text if letter.isprintable() or letter in "\n\t\r"
    )
    letters = sorted(every, key=lambda letter: not letter.isalpha())  # the plainest example first
    given = told.encode_batch_fast(letters, add_special_tokens=False)
    number = told.token_to_id(unknown)
    return next((letter for letter, found in zip(letters, given, strict=True) if number in found.ids), None)


def hostile_texts(control: ControlTokens) -> list[str]:
    """The plain texts, and each control token in the places and disguises where rules have taken it for itself."""
    texts = list(PLAIN_TEXTS)
    for token in control.ids:
        wide = "".join(chr(ord(letter) + 0xFEE0) if "!" <= letter <= "~" else letter for letter in token)
        spaced = token.replace("▁", " ").replace("Ġ", " ").replace("Ċ", "\n")
        texts += [token, f" {token} ", f"a{token}b\n{token}", token * 2, token.upper(), token.lower(), wide, spaced]
    return texts


def ids_of(encoder: tokenizers.Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    return [encoding.ids for encoding in encoder.encode_batch_fast(list(texts), add_special_tokens=False)]


def prove(encoder: tokenizers.Tokenizer, texts: Sequence[str], forbidden: dict[int, str]) -> list[list[int]]:
    """The ids of each text; BadInput if one gives a forbidden id, or not the same ids alone and a second time."""
    ids = ids_of(encoder, texts)
    for text, found in zip(texts, ids, strict=True):
        for id in found:
            if id in forbidden:
                raise BadInput(f"the text {text[:40]!r} gives the control token {forbidden[id]!r} (id {id})")
    for text, found in zip(PLAIN_TEXTS, ids, strict=False):
        if encoder.encode(text, add_special_tokens=False).ids != found:
            raise BadInput(f"the text {text[:40]!r} gives other ids each time")
    return ids
