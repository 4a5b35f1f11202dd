"""The files of a tokenizer folder, read into rules of the `tokenizers` library.

Nothing in a folder is executed or unpickled. What tokenizer.json holds of one call's state is left out.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers

from lit_gpt.cli import BadInput
from lit_gpt.data.library_faults import one_line
from lit_gpt.data.sentencepiece_model import asks_bare, read_model, use_metaspace
from lit_gpt.data.tokenizer_rules import ids_of, require_bounded, require_sound_ids, without_call_state

FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
"""The files of a tokenizer folder that are read; others are ignored."""
LARGEST_FILE_BYTES = 256 << 20
"""The largest tokenizer.json that is known has 35 MB."""


class Folder(NamedTuple):
    path: Path
    backend: tokenizers.Tokenizer
    config: dict[str, Any]
    """special_tokens_map.json, and tokenizer_config.json over it."""
    digests: str
    """Name and hash of each file as it is used."""
    says_all: bool
    """Whether these files have always been read by these rules (else the fingerprint needs more than their hashes)."""
    notes: list[str]
    """What is not obeyed, in words."""


def read_folder(path: Path) -> Folder:
    """tokenizer.json, or tokenizer.model where there is none; raises BadInput if neither can be read."""
    files = {name: _content(path / name) for name in FILES if (path / name).is_file()}
    config = {**_json(files, "special_tokens_map.json"), **_json(files, "tokenizer_config.json")}
    notes: list[str] = []
    if "tokenizer.json" in files:
        backend = parse(files["tokenizer.json"])
        files["tokenizer.json"], state = without_call_state(files["tokenizer.json"], backend)
        if state:
            backend = parse(files["tokenizer.json"])
            notes = [f"{', '.join(state)} (the state of one call)"]
        notes += _other_ids(files, config, backend)
        if asks_bare(config) and description(backend.pre_tokenizer).get("type") == "Metaspace":
            # it was converted with prepend_scheme="first"; that, like later versions of transformers, gives other ids
            # than training saw
            use_metaspace(backend)
    elif "tokenizer.model" in files:
        backend = read_model(path / "tokenizer.model", _json(files, "added_tokens.json"), config)
    else:
        raise BadInput(
            "it holds neither tokenizer.json nor tokenizer.model. If transformers reads it, "
            "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER) writes a tokenizer.json"
        )
    require_bounded(description(backend.normalizer), description(backend.decoder))
    require_sound_ids(backend, files.get("tokenizer.json", b""))
    if description(backend.post_processor).get("type") != "ByteLevel":  # that one moves offsets only
        before = ids_of(backend, ["a b"])  # others add tokens, or repeat and drop the text's
        backend.post_processor = None
        if ids_of(backend, ["a b"]) != before:
            notes.append("its post-processor")
    digests = "".join(f"{name} {hashlib.sha256(content).hexdigest()}\n" for name, content in sorted(files.items()))
    # a space before each text once did not come before a text that begins with one
    says_all = "tokenizer.json" in files or backend.normalizer is None
    return Folder(path, backend, config, digests, says_all, notes)


def _other_ids(files: dict[str, bytes], config: dict[str, Any], backend: tokenizers.Tokenizer) -> list[str]:
    """What the files beside tokenizer.json say of added tokens that it does not, in words."""
    said = {"added_tokens.json": _json(files, "added_tokens.json").items()}
    if isinstance(decoder := config.get("added_tokens_decoder"), dict):
        tokens = ((token.get("content"), id) for id, token in decoder.items() if isinstance(token, dict))
        said["added_tokens_decoder of tokenizer_config.json"] = tokens  # type: ignore[assignment]
    notes = []
    for name, pairs in said.items():
        other = [text for text, id in pairs if isinstance(text, str) and str(backend.token_to_id(text)) != str(id)]
        if other:
            more = f" and {len(other) - 3} more" if len(other) > 3 else ""
            notes.append(f"{', '.join(map(repr, other[:3]))}{more} in {name}, with other ids than in tokenizer.json")
    return notes


def parse(content: bytes) -> tokenizers.Tokenizer:
    with one_line("tokenizer.json is not a tokenizer that the `tokenizers` library reads"):
        backend = tokenizers.Tokenizer.from_buffer(content)
    backend.encode_special_tokens = True  # no file holds this
    return backend


def description(part: Any) -> dict[str, Any]:
    """The JSON form of a backend's normalizer, pre-tokenizer or post-processor."""
    return json.loads(part.__getstate__()) if part is not None else {}


def _content(path: Path) -> bytes:
    try:
        if path.stat().st_size > LARGEST_FILE_BYTES:
            raise BadInput(f"{path.name} has more than {LARGEST_FILE_BYTES >> 20} MiB: it is no tokenizer's")
        return path.read_bytes()
    except OSError as error:
        raise BadInput(f"cannot read {path.name}: {error.strerror}") from None


def _json(files: dict[str, bytes], name: str) -> dict[str, Any]:
    try:
        content = json.loads(files.get(name, b"{}"))
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{name} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise BadInput(f"{name} holds no JSON object")
    return content
