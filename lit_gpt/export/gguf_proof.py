"""The proof that llama.cpp reads a GGUF file with the ids that the model was trained on.

The file is read back by the package gguf, and its tokenizer rebuilt by llama.cpp's rules from what the file says, not
from what was written. Where llama.cpp itself is installed (the package xllamacpp), it reads the file too. Both must
give our ids for texts where tokenizers are known to differ, and for every token of the vocabulary beside others.
Costs: some seconds for a vocabulary of 32,000.
"""

from __future__ import annotations

import heapq
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import tokenizers

from lit_gpt.cli import BadInput
from lit_gpt.data.tokenizer import Tokenizer
from lit_gpt.export import llama_cpp
from lit_gpt.export.gguf_vocabulary import SPLITS, with_split
from lit_gpt.export.hf_tokenizer import TRICKY_TEXTS
from lit_gpt.export.parity import GERMAN_TEXT

log = logging.getLogger(__name__)

Ids = list[int]
_TOKENS_A_PROBE = 64
_SEPARATORS = (" ", "'", "\n", "  ", "-", "")
_PROBES = (
    "'Der' Grimm'sche Ku'damm 's geht's um'n M'gladbach, 'TIS",
    "a  b   c\n\n\n  d \n e\t\tf\r\n\r\ng \u00a0 \u3000h",
    "GmbH camelCase straßenBahn ÜBER ǅ ß.“ ,“ …) !?!? ...--->",
    "1 22 333 4444 55555 §12 3,5% ½ ² ٣٤",
    " führender und folgender ",
    "▁ ▁▁a _▁ <0x41> <unk> <s> </s> [INST] <|endoftext|>",
    "u\u0308ber cafe\u0301 \u0301\u0301 👩‍🔬 \ufeff \u200d नमस्ते 한국어 ไทย عربى",
)
"""Where llama.cpp's tokenizers and those of `tokenizers` are known to differ."""


def probes(tokenizer: Tokenizer) -> list[str]:
    """Texts to compare ids on: hostile ones, and all tokens of the vocabulary, some dozens a text."""
    fixed = [*_PROBES, *TRICKY_TEXTS, GERMAN_TEXT]
    texts = [text for id in range(tokenizer.vocab_size) if "\ufffd" not in (text := tokenizer.decode([id])) and text]
    chunks = (texts[start : start + _TOKENS_A_PROBE] for start in range(0, len(texts), _TOKENS_A_PROBE))
    joined = [_SEPARATORS[number % len(_SEPARATORS)].join(chunk) for number, chunk in enumerate(chunks)]
    added = [token.content for token in tokenizer._backend.get_added_tokens_decoder().values()]
    around = [form.format(content) for content in added for form in ("{0}", "x{0}y", " {0} e {0}{0}\n{0}")]
    return [*fixed, *_without_unknown(tokenizer, [*fixed, *joined]), *around, *joined]


def _without_unknown(tokenizer: Tokenizer, texts: Sequence[str]) -> list[str]:
    """The texts that hold characters without a token, without these: llama.cpp refuses the whole text otherwise."""
    name = getattr(tokenizer._backend.model, "unk_token", None)
    unknown = None if name is None else tokenizer._backend.token_to_id(name)
    kept = []
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        if unknown in ids:
            kept.append("".join(character for character in text if unknown not in tokenizer.encode(character)))
    return kept


def require_our_ids(path: Path, gguf: ModuleType, tokenizer: Tokenizer, texts: Sequence[str], *, add_bos: bool) -> None:
    """Raise BadInput unless the file gives our ids for `texts`, by its fields and, where it is installed, by llama.cpp.

    A text may also be refused (where a character has no token): then no wrong id is given, and a warning says so.
    """
    ours = tokenizer.encode_batch(texts)
    encode = read_back(gguf.GGUFReader(path))
    theirs = [encode(text) for text in texts]
    refused = _require_same("llama.cpp's rules with the file's fields", tokenizer, texts, ours, theirs)
    if llama_cpp.is_installed():
        begin = [tokenizer.bos_id] if add_bos and tokenizer.bos_id is not None else []
        theirs = llama_cpp.tokenize(path, texts, begun=["e"])
        who = f"llama.cpp (xllamacpp {llama_cpp.version()})"
        refused = _require_same(who, tokenizer, [*texts, "e"], [*ours, begin + tokenizer.encode("e")], theirs)
    else:
        log.warning("xllamacpp is not installed, so llama.cpp itself was not asked: pip install 'lit_gpt[llama-cpp]'")
    if refused is not None:
        log.warning("llama.cpp refuses a text with a character that the vocabulary lacks, such as %r", refused)


def _require_same(
    who: str, tokenizer: Tokenizer, texts: Sequence[str], ours: Sequence[Ids], theirs: Sequence[Ids | None]
) -> str | None:
    """A text that was refused, or None; BadInput at the first text with other ids, or refused though training read it
    without loss."""
    refused = None
    for text, expected, found in zip(texts, ours, theirs, strict=True):
        if found is None and tokenizer.decode(expected) != text:
            refused = text
        elif found != expected:
            at = next((i for i, id in enumerate(expected) if (found or [])[i : i + 1] != [id]), len(expected))
            instead = "refuses it" if found is None else f"has {found[at : at + 5]} from token {at} on"
            raise BadInput(
                f"no GGUF file was written, as llama.cpp would read texts otherwise: for {text[:80]!r}, training has "
                f"{expected[at : at + 5]}, {who} {instead}"
            )
    return refused


def read_back(reader: Any) -> Callable[[str], Ids | None]:
    """The encoder that llama.cpp makes of a file's fields. It gives None for a text that llama.cpp refuses."""

    def field(name: str, default: Any = None) -> Any:
        found = reader.fields.get(f"tokenizer.ggml.{name}")
        return default if found is None else found.contents()

    tokens, types = field("tokens"), field("token_type")
    user_defined = [(text, id) for id, text in enumerate(tokens) if types[id] == 4]  # gguf.TokenType.USER_DEFINED
    user_defined.sort(key=lambda item: -len(item[0].encode()))
    if field("model") == "gpt2":
        encode: Callable[[str], Ids | None] = _over_bytes(tokens, field("merges"), field("pre"))
        prefix = ""
    else:
        encode = _over_characters({text: id for id, text in enumerate(tokens)}, field("scores"))
        prefix = "▁" if field("add_space_prefix", True) else ""

    def encode_text(text: str) -> Ids | None:
        ids: Ids = []
        after_token = True
        for part in _parts(text, user_defined):
            if isinstance(part, int):
                ids.append(part)
            else:
                found = encode(prefix + part if after_token else part)
                if found is None:
                    return None
                ids += found
            after_token = isinstance(part, int)
        return ids

    return encode_text


def _parts(text: str, user_defined: Sequence[tuple[str, int]]) -> list[str | int]:
    """`text` cut at the tokens that are looked for first, the longest first."""
    parts: list[str | int] = [text] if text else []
    for content, id in user_defined:
        if content in text:
            parts = [
                piece for part in parts for piece in ([part] if isinstance(part, int) else _cut(part, content, id))
            ]
    return parts


def _cut(text: str, content: str, id: int) -> Iterator[str | int]:
    for number, piece in enumerate(text.split(content)):
        if number:
            yield id
        if piece:
            yield piece


def _over_bytes(tokens: Sequence[str], merges: Sequence[str], pre: str) -> Callable[[str], Ids]:
    model = {
        "type": "BPE", "vocab": {text: id for id, text in enumerate(tokens)}, "merges": merges, "unk_token": None,
        "dropout": None, "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": False,
        "byte_fallback": False, "ignore_merges": False,
    }  # fmt: skip
    rules: dict[str, Any] = {
        "version": "1.0",
        "added_tokens": [],
        "post_processor": None,
        "decoder": None,
        "model": model,
    }
    backend = tokenizers.Tokenizer.from_str(json.dumps(rules | with_split(rules, SPLITS[pre])))
    return lambda text: backend.encode(text, add_special_tokens=False).ids


def _over_characters(ids: dict[str, int], scores: Sequence[float]) -> Callable[[str], Ids | None]:
    """llama.cpp's sentencepiece: of all neighbours that make a token, the highest score is merged, the leftmost first;
    what is no token in the end becomes its bytes."""

    def encode(text: str) -> Ids | None:
        pieces: list[str] = list(text.replace(" ", "▁"))
        before, after = list(range(-1, len(pieces) - 1)), [*range(1, len(pieces)), -1]
        queue: list[tuple[float, int, int, str]] = []

        def consider(left: int, right: int) -> None:
            if left >= 0 and right >= 0 and (id := ids.get(pieces[left] + pieces[right])) is not None:
                heapq.heappush(queue, (-scores[id], left, right, pieces[left] + pieces[right]))

        for right in range(1, len(pieces)):
            consider(right - 1, right)
        while queue:
            _, left, right, merged = heapq.heappop(queue)
            if not pieces[left] or not pieces[right] or pieces[left] + pieces[right] != merged:
                continue  # one of them was merged with another meanwhile
            pieces[left], pieces[right] = merged, ""
            after[left] = after[right]
            if after[right] >= 0:
                before[after[right]] = left
            consider(before[left], left)
            consider(left, after[left])
        found = [
            ids.get(name) for piece in pieces if piece
            for name in ([piece] if piece in ids else [f"<0x{byte:02X}>" for byte in piece.encode()])
        ]  # fmt: skip
        return None if None in found else found  # type: ignore[return-value]

    return encode
