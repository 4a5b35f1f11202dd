"""A sentencepiece .model as rules of the `tokenizers` library, compared with the sentencepiece library itself.

Read are BPE models that leave the text as it is, as LLaMA's do; others are refused, since their ids would differ. A
folder whose settings ask for LLaMA without a space before the text (legacy=false, add_prefix_space=false) is read
without the model's own normalisation, as transformers reads it and as the published models were trained.
Costs: 1 s for 32,000 pieces, half of it for the comparison.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from lit_gpt.cli import BadInput
from lit_gpt.data.tokenizer_rules import PLAIN_TEXTS, named_tokens

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Kinds of pieces in sentencepiece_model.proto."""
BPE = 2
SPEC = 0x1A
"""The key of ModelProto.normalizer_spec; a second one overrides the fields that it holds."""


class Piece(NamedTuple):
    text: str
    score: float
    kind: int


def asks_bare(config: dict[str, Any]) -> bool:
    """Whether a folder's settings ask for a LLaMA tokenizer that adds no space before a text."""
    return config.get("legacy") is False and config.get("add_prefix_space") is False


def use_metaspace(backend: tokenizers.Tokenizer) -> None:
    """Write spaces as "▁", with none before the text."""
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])


def read_model(path: Path, added: dict[str, int], config: dict[str, Any]) -> tokenizers.Tokenizer:
    """The model at `path` with the folder's added_tokens.json; `config` gets the model's BOS and EOS if it names none.

    Raises BadInput if sentencepiece gives other ids for any plain text, or for any of the model's pieces.
    """
    import sentencepiece

    content = path.read_bytes()
    bare, prefix_asked = asks_bare(config), config.get("add_prefix_space") is not False
    try:
        sentencepiece.SentencePieceProcessor(model_proto=content)
        own, normalizer, kind = _parse(content)
    except (RuntimeError, ValueError, IndexError, KeyError, TypeError):
        raise BadInput(f"{path.name} is not a sentencepiece model") from None
    if kind != BPE:
        raise BadInput(f"{path.name} is not a BPE model (unigram?): give a folder with tokenizer.json")
    if normalizer.get(2) and not bare:
        raise BadInput(
            f"{path.name} rewrites texts before it splits them ({normalizer[1].decode(errors='replace')}): "
            "give the folder with the tokenizer.json that its model was trained with"
        )
    prefix = bool(normalizer.get(3, 1)) and prefix_asked
    backend = _backend(own, prefix=prefix)
    asked = b"\x18" + bytes([prefix]) + (b"\x12\x00\x20\x00" if bare else b"")  # no rules, spaces left as they are
    reference = sentencepiece.SentencePieceProcessor(model_proto=content + bytes([SPEC, len(asked)]) + asked)
    texts = [*PLAIN_TEXTS, *(piece.text.replace("▁", " ") for piece in own)]
    encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
    for text, theirs, ours in zip(texts, reference.encode(texts), encodings, strict=True):
        if theirs != ours.ids:
            raise BadInput(
                f"{path.name} gives {text[:40]!r} the ids {theirs[:9]} in sentencepiece, {ours.ids[:9]} by the rules "
                "known here: give the folder with the tokenizer.json that its model was trained with"
            )
    control = {piece.text for piece in own if piece.kind in (CONTROL, UNKNOWN)} | {*named_tokens(config)}
    if prefix and config.get("legacy") is False and added.keys() - control:
        raise BadInput(
            f"added_tokens.json beside {path.name}, with legacy=false and a space before the text, is known only as "
            "tokenizer.json: give the folder with that"
        )
    for text, number in sorted(added.items(), key=lambda item: item[1]):
        backend.add_tokens([tokenizers.AddedToken(text, normalized=not prefix, special=False)])
        if backend.token_to_id(text) != number:
            raise BadInput(f"added_tokens.json: {text!r} cannot have the id {number}")
    for name, number in (("bos_token", reference.bos_id()), ("eos_token", reference.eos_id())):
        if number >= 0:
            config.setdefault(name, reference.id_to_piece(number))
    return backend


def _backend(own: list[Piece], *, prefix: bool) -> tokenizers.Tokenizer:
    """Every way to make a piece of two others is a merge, in the order of the scores; so come the published ids."""
    vocab = {piece.text: number for number, piece in enumerate(own)}
    parts = {piece.text: number for number, piece in enumerate(own) if piece.kind in (NORMAL, UNUSED)}
    merges = [
        (text[:cut], text[cut:])
        for text, _ in sorted(parts.items(), key=lambda item: -own[item[1]].score)
        for cut in sorted(range(1, len(text)), key=lambda cut, text=text: parts.get(text[:cut], 0))  # type: ignore[misc]
        if text[:cut] in parts and text[cut:] in parts
    ]
    unknown = next(piece.text for piece in own if piece.kind == UNKNOWN)
    has_bytes = any(piece.kind == BYTE for piece in own)
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=has_bytes))
    if prefix:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", left=1)]
        backend.decoder = decoders.Sequence(steps)
    else:
        use_metaspace(backend)
    backend.encode_special_tokens = True
    for special, kinds in ((True, (CONTROL, UNKNOWN)), (False, (USER_DEFINED,))):
        for piece in own:
            if piece.kind in kinds:
                backend.add_tokens([tokenizers.AddedToken(piece.text, normalized=False, special=special)])
    return backend


# The file: a protocol buffer, sentencepiece_model.proto


def _parse(content: bytes) -> tuple[list[Piece], dict[int, Any], int]:
    """The pieces, the fields of normalizer_spec (1 name, 2 rules, 3 add_dummy_prefix), and trainer_spec.model_type."""
    own, normalizer, trainer = [], {}, {}
    for number, value in _fields(content):
        if number == 1:
            fields = dict(_fields(value))
            score = struct.unpack("<f", fields.get(2, b"\0\0\0\0"))[0]
            own.append(Piece(fields[1].decode(), score, fields.get(3, NORMAL)))
        elif number == 2:
            trainer = dict(_fields(value))
        elif number == 3:
            normalizer = dict(_fields(value))
    return own, normalizer, trainer.get(3, 1)


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Number and value of each field: an int for a varint, else bytes."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at, value, shift = at + 1, value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value

    while at < len(message):
        key = varint()
        if key & 7 == 0:
            yield key >> 3, varint()
            continue
        size = varint() if key & 7 == 2 else {1: 8, 5: 4}[key & 7]
        yield key >> 3, message[at : at + size]
        at += size
