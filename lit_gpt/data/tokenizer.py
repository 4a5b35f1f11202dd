"""Text to token ids and back, with the same ids in every program, and a fingerprint that identifies the tokenizer.

Invariants: encoding adds no BOS or EOS; no text gives a control token, however it spells one ("</s>"), which is proved
on hostile texts at each load; the published LLäMmlein tokenizer gives the ids that its models were trained on.
Costs: loading takes 0.4 s; encoding runs at about 1 M tokens/s per core, the `tokenizers` library's own speed.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import logging
import multiprocessing
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers

from lit_gpt.cli import BadInput
from lit_gpt.data.library_faults import one_line
from lit_gpt.data.tokenizer_folder import Folder, description, parse, read_folder
from lit_gpt.data.tokenizer_rules import (
    hostile_texts,
    ids_of,
    lost_character,
    mark_control_tokens,
    named_tokens,
    prove,
    unreachable,
    without_stripping,
)
from lit_gpt.values import no_such_folder

NEWLINES = r"\n+"
NEWLINE_RUNS = {"type": "Split", "pattern": {"Regex": NEWLINES}, "behavior": "Isolated", "invert": False}
"""First pre-tokenizer of the project's own tokenizers: no token joins a newline with anything else."""
PART_CHARACTERS = 1_000_000
"""Longer texts are encoded in parts, where that gives the same ids: memory depends on the part, not the text."""

_TRICKY = "Straße  \t\n\n führe e\u0301 </s><s> <unk> 🐑漢字 $<\\^`{}~ 1234567,89 \u0000\u200b\r\n ▁_ <0x0A> Ende"

log = logging.getLogger(__name__)


class Tokenizer:
    """One tokenizer folder, loaded."""

    def __init__(self, folder: Folder) -> None:
        """Raise BadInput if `folder` names no EOS, or if a text would give a control token."""
        self.folder = folder.path
        rules = json.loads(folder.backend.to_str())
        used = rules | {"added_tokens": copy.deepcopy(rules["added_tokens"])}
        stripping = without_stripping(used)
        control = mark_control_tokens(used, named_tokens(folder.config))
        bos_id = _control_id(control.ids, folder.config, "bos_token")
        eos_id = _control_id(control.ids, folder.config, "eos_token")
        if eos_id is None:
            raise BadInput("tokenizer_config.json names no eos_token, which ends a document")
        self.bos_id, self.eos_id = bos_id, eos_id
        self._backend = folder.backend if used == rules else parse(json.dumps(used).encode())
        unspoken = unreachable(used, control)
        self._encoder = self._backend if unspoken is None else parse(json.dumps(unspoken).encode())
        self._cuts_at_newline = _cuts_at_newline(self._encoder)
        self.vocab_size = max(self._backend.get_vocab(with_added_tokens=True).values()) + 1

        texts = hostile_texts(control)
        forbidden = {id: text for text, id in control.ids.items() if text != control.unknown or id in (bos_id, eos_id)}
        ids = prove(self._encoder, texts, forbidden)
        by_files = ids if self._encoder is folder.backend else ids_of(folder.backend, texts)
        leaks = {forbidden[id]: None for found in by_files for id in found if id in forbidden}
        self.notes = [
            *folder.notes,
            *([f"{', '.join(map(repr, leaks))} in a text as a control token"] if leaks else []),
            *([f"spaces taken away beside {', '.join(map(repr, stripping))}"] if stripping else []),
        ]
        """What of the folder is not obeyed, in words."""
        digests = folder.digests
        if by_files != ids or not folder.says_all:
            digests += json.dumps(ids)
        self._rules_hash = hashlib.sha256(digests.encode()).hexdigest()

    @classmethod
    def from_folder(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """Load tokenizer.json, or tokenizer.model (sentencepiece BPE) where there is no tokenizer.json.

        Says once what of the folder is not obeyed. Raises BadInput if neither file can be read, if no EOS is named, or
        if a text would give a control token.
        """
        path = Path(path)
        if not path.is_dir():
            said = f"that is a file; give its folder, {path.parent}" if path.is_file() else no_such_folder(path)
            raise BadInput(f"tokenizer folder {path}: {said}")
        with one_line(f"tokenizer folder {path}"):
            tokenizer = cls(read_folder(path))
        if tokenizer.notes and multiprocessing.parent_process() is None:  # a program's helpers leave it to the program
            _say_once(f"tokenizer folder {path}: not obeyed: {'; '.join(tokenizer.notes)}")
        return tokenizer

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text; the whole batch is encoded in one call of the library."""
        parts = [self._parts(text) for text in texts]
        flat = [part for text_parts in parts for part in text_parts]
        encodings = iter(self._encoder.encode_batch_fast(flat, add_special_tokens=False))
        return [
            next(encodings).ids if len(text_parts) == 1 else [id for _ in text_parts for id in next(encodings).ids]
            for text_parts in parts
        ]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def require_lossless(self) -> None:
        """Raise BadInput if a text's characters could vanish; for what makes data, as older data may hold no such."""
        lost = lost_character(json.loads(self._encoder.to_str()))
        if lost is not None:
            raise BadInput(
                f"characters such as {lost!r} would vanish from texts: its BPE model has no token for them, no "
                "unk_token, and not all bytes. scripts/train_tokenizer.py makes one that loses nothing"
            )

    def rules(self) -> dict[str, Any]:
        """The tokenizer.json of the ids in use; in it alone, a control token in a text is that token."""
        rules: dict[str, Any] = json.loads(self._backend.to_str())
        return rules

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of the folder's rules as used and of a probe text's ids, so that a library that splits otherwise shows.

        The rules are the folder's files, but for the state of a call; where texts get other ids than the files alone
        say, those of the hostile texts too.
        """
        ids = json.dumps(self.encode(_TRICKY)).encode()
        return hashlib.sha256(self._rules_hash.encode() + ids).hexdigest()

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
    first = description(backend.pre_tokenizer)
    if first.get("type") == "Sequence":
        return first["pretokenizers"][0] == NEWLINE_RUNS
    starts_alike = first.get("type") == "Metaspace" and first["prepend_scheme"] == "never"
    return starts_alike and any(token.content == "\n" for token in added)


def _control_id(ids: dict[str, int], config: dict[str, Any], name: str) -> int | None:
    token = config.get(name)
    if isinstance(token, dict):
        token = token.get("content")
    if token is None:
        return None
    if not isinstance(token, str):
        raise BadInput(f"{name} {token!r} is not the text of a token")
    if token not in ids:
        raise BadInput(f"{name} {token!r} is not in its vocabulary")
    return ids[token]


@functools.cache
def _say_once(line: str) -> None:
    log.warning(line)
