"""Text to token ids and back, with the same ids in every program, and a fingerprint that identifies the tokenizer.

Invariants: encoding adds no BOS or EOS; control tokens spelled out in a text ("</s>") stay text; the published
LLäMmlein tokenizer gives the ids that its models were trained on. Nothing in a tokenizer folder is executed or
unpickled.
Costs: loading takes 0.1 s; encoding runs at about 1 M tokens/s per core, the `tokenizers` library's own speed.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from lit_gpt.cli import BadInput

FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
"""The files of a tokenizer folder that are read; others are ignored."""
NEWLINES = r"\n+"
NEWLINE_RUNS = {"type": "Split", "pattern": {"Regex": NEWLINES}, "behavior": "Isolated", "invert": False}
"""First pre-tokenizer of the project's own tokenizers: no token joins a newline with anything else."""
PART_CHARACTERS = 1_000_000
"""Longer texts are encoded in parts, where that gives the same ids: memory depends on the part, not the text."""

_TRICKY = "Straße  \t\n\n führe e\u0301 </s><s> <unk> 🐑漢字 $<\\^`{}~ 1234567,89 \u0000\u200b\r\n ▁_ <0x0A> Ende"


class Tokenizer:
    """One tokenizer folder, loaded."""

    def __init__(self, backend: tokenizers.Tokenizer, bos_id: int | None, eos_id: int, files_hash: str) -> None:
        backend.encode_special_tokens = True
        self._backend = backend
        self._files_hash = files_hash
        self._cuts_at_newline = _cuts_at_newline(backend)
        self.bos_id = bos_id
        self.eos_id = eos_id
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1

    @classmethod
    def from_folder(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """Load tokenizer.json, or tokenizer.model (sentencepiece BPE) where there is no tokenizer.json.

        Raises BadInput if neither can be read, or if no EOS is named.
        """
        path = Path(path)
        if not path.is_dir():
            raise BadInput(f"tokenizer folder {path}: there is no such folder")
        files = {name: (path / name).read_bytes() for name in FILES if (path / name).is_file()}
        config = {**_json(files, "special_tokens_map.json", path), **_json(files, "tokenizer_config.json", path)}
        if "tokenizer.json" in files:
            backend = _parse(files["tokenizer.json"], path / "tokenizer.json")
            if _starts_bare(backend, config):
                _use_metaspace(backend, prefix=False)
        elif "tokenizer.model" in files:
            backend = _from_sentencepiece(path / "tokenizer.model", _json(files, "added_tokens.json", path), config)
        else:
            raise BadInput(f"tokenizer folder {path} holds neither tokenizer.json nor tokenizer.model")
        eos_id = _control_id(backend, config, "eos_token", path)
        if eos_id is None:
            raise BadInput(f"tokenizer folder {path}: tokenizer_config.json names no eos_token, which ends a document")
        bos_id = _control_id(backend, config, "bos_token", path)
        digests = "".join(f"{name} {hashlib.sha256(content).hexdigest()}\n" for name, content in sorted(files.items()))
        return cls(backend, bos_id, eos_id, hashlib.sha256(digests.encode()).hexdigest())

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text; the whole batch is encoded in one call of the library."""
        parts = [self._parts(text) for text in texts]
        flat = [part for text_parts in parts for part in text_parts]
        encodings = iter(self._backend.encode_batch_fast(flat, add_special_tokens=False))
        return [
            next(encodings).ids if len(text_parts) == 1 else [id for _ in text_parts for id in next(encodings).ids]
            for text_parts in parts
        ]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of the folder's files and of a probe text's ids, so that a library that tokenizes differently shows."""
        ids = json.dumps(self.encode(_TRICKY)).encode()
        return hashlib.sha256(self._files_hash.encode() + ids).hexdigest()

    def _parts(self, text: str) -> list[str]:
        """`text` cut after runs of newlines into parts of about PART_CHARACTERS, which give the whole text's ids."""
        if len(text) <= PART_CHARACTERS or not self._cuts_at_newline:
            return [text]
        parts, start = [], 0
        while len(text) - start > PART_CHARACTERS:
            cut = text.rfind("\n", start, start + PART_CHARACTERS) + 1
            if not cut:
                cut = text.find("\n", start + PART_CHARACTERS) + 1
            while 0 < cut < len(text) and text[cut] == "\n":
                cut += 1
            if not cut:
                break
            parts.append(text[start:cut])
            start = cut
        if start < len(text):
            parts.append(text[start:])
        return parts


def _json(files: dict[str, bytes], name: str, path: Path) -> dict[str, Any]:
    try:
        content = json.loads(files.get(name, b"{}"))
    except ValueError as error:
        raise BadInput(f"{path / name} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise BadInput(f"{path / name} holds no JSON object")
    return content


def _parse(content: bytes, path: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # noqa: BLE001 (the library raises plain Exception for a malformed file)
        raise BadInput(f"{path} is not a tokenizer that the `tokenizers` library reads: {error}") from None


def _description(part: Any) -> dict[str, Any]:
    """The JSON form of a backend's normalizer or pre-tokenizer."""
    return json.loads(part.__getstate__()) if part is not None else {}


def _starts_bare(backend: tokenizers.Tokenizer, config: dict[str, Any]) -> bool:
    """Whether this is a LLaMA tokenizer that adds no space before a text.

    Its settings say so (legacy=false, add_prefix_space=false), but its tokenizer.json was converted with
    prepend_scheme="first". That, like later versions of transformers, gives other ids than training saw. A byte-level
    tokenizer has no Metaspace and stays as it is.
    """
    asked = config.get("legacy") is False and config.get("add_prefix_space") is False
    return asked and _description(backend.pre_tokenizer).get("type") == "Metaspace"


def _use_metaspace(backend: tokenizers.Tokenizer, *, prefix: bool) -> None:
    """Write spaces as "▁"; with `prefix`, add one before the text, which decoding removes again."""
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first" if prefix else "never", split=False)
    strip = [decoders.Strip(" ", left=1)] if prefix else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])


def _cuts_at_newline(backend: tokenizers.Tokenizer) -> bool:
    """Whether cutting a text after a run of newlines leaves its ids as they are, by the tokenizer's rules.

    True where no token joins a newline with other characters (an added token "\\n", or a first split at runs of
    newlines) and no rule depends on where a text begins.
    """
    if backend.normalizer is not None:
        return False
    added = [token for token in backend.get_added_tokens_decoder().values() if "\n" in token.content]
    if any(token.content.strip("\n") or token.lstrip or token.rstrip or token.single_word for token in added):
        return False
    first = _description(backend.pre_tokenizer)
    if first.get("type") == "Sequence":
        return first["pretokenizers"][0] == NEWLINE_RUNS
    starts_alike = first.get("type") == "Metaspace" and first["prepend_scheme"] == "never"
    return starts_alike and any(token.content == "\n" for token in added)


def _control_id(backend: tokenizers.Tokenizer, config: dict[str, Any], name: str, path: Path) -> int | None:
    token = config.get(name)
    if isinstance(token, dict):
        token = token.get("content")
    if token is None:
        return None
    number = backend.token_to_id(token)
    if number is None:
        raise BadInput(f"tokenizer folder {path}: {name} {token!r} is not in its vocabulary")
    return number


def _from_sentencepiece(path: Path, added: dict[str, int], config: dict[str, Any]) -> tokenizers.Tokenizer:
    """A sentencepiece BPE model as LLaMA reads it: no text normalisation, spaces as "▁".

    Every way to make a piece of two others is a merge, in the order of the pieces; so come the published models' ids.
    Where the folder names no BOS or EOS, `config` gets the model's own.
    """
    import sentencepiece

    try:
        model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError):
        raise BadInput(f"{path} is not a sentencepiece model") from None
    numbers = range(model.vocab_size())
    vocab = {model.id_to_piece(number): number for number in numbers}
    controls = [model.id_to_piece(number) for number in numbers if model.is_control(number) or model.is_unknown(number)]
    scores = [model.get_score(number) for number in numbers]
    if any(score != int(score) for score in scores):  # a BPE model's scores are its merge ranks
        raise BadInput(f"{path} is not a BPE model (unigram?): give a folder with tokenizer.json")
    merges = [
        (piece[:cut], piece[cut:])
        for piece, _ in sorted(vocab.items(), key=lambda item: -scores[item[1]])
        for cut in sorted(range(1, len(piece)), key=lambda cut, piece=piece: vocab.get(piece[:cut], 0))  # type: ignore[misc]
        if piece[:cut] in vocab and piece[cut:] in vocab
    ]
    unknown = model.id_to_piece(model.unk_id())
    has_bytes = any(model.is_byte(number) for number in numbers)
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=has_bytes))
    backend.add_special_tokens([tokenizers.AddedToken(piece, normalized=False, special=True) for piece in controls])
    for piece, number in sorted(added.items(), key=lambda item: item[1]):
        backend.add_tokens([tokenizers.AddedToken(piece, normalized=True, special=False)])
        if backend.token_to_id(piece) != number:
            raise BadInput(f"{path.parent / 'added_tokens.json'}: {piece!r} cannot have the id {number}")
    for name, number in (("bos_token", model.bos_id()), ("eos_token", model.eos_id())):
        if number >= 0:
            config.setdefault(name, model.id_to_piece(number))
    model_prefixes = model.encode("a", out_type=str)[0].startswith("▁")
    _use_metaspace(backend, prefix=model_prefixes and config.get("add_prefix_space") is not False)
    return backend
