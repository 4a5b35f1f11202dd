"""The request of a store build, and whether a destination is free for it, holds it unfinished, or holds it finished.

Invariants: a request names everything that the bytes of the data set depend on, and nothing else; a destination is
never written by two builds at once, nor by builds of different requests.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_gpt.cli import NO_ROOM, BadInput, require_at_least
from lit_gpt.data.token_store import MANIFEST, SHARD_TOKENS
from lit_gpt.files import OWN_JSON_BYTES, publish, read_json, sweep
from lit_gpt.locks import Lock, LockHeld
from lit_gpt.prepare.document_source import PIECES_VERSION
from lit_gpt.prepare.records import Fields, SourceFile

BUILDER_VERSION = 1
"""Increased when the same request gives other bytes than before."""
WORK = "build"
"""Folder in the destination for all work in progress."""
SUMMARY = "summary.json"
REJECTS = "rejects.jsonl"
DEFAULT_FIELDS = Fields()

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BuildSettings:
    """The settings of prepare_data; raises BadInput for values out of range."""

    source: tuple[str, ...]
    """Files and folders of documents."""
    tokenizer_path: str
    """Tokenizer folder."""
    destination_path: str
    """Folder for train/, val/, rejects.jsonl and summary.json."""
    val_fraction: float = 0.01
    """Share of all different texts that goes to val/."""
    workers: int = 1
    """Processes, one core each."""
    shard_tokens: int = SHARD_TOKENS
    """Largest number of tokens in a shard (a longer document has a shard of its own)."""
    keep_order: bool = False
    """Keep the order of the input instead of shuffling by a hash of the id."""
    max_reject_fraction: float = 0.001
    """Share of lines that may be rejected before the build stops."""
    allow_damaged_files: bool = False
    """Take what can be read of a file that cannot be read to its end; what is lost is rejected."""
    fields: Fields = DEFAULT_FIELDS
    """The fields of a record that hold its text and its id."""
    seed: int = 0
    """Key of the hashes that shuffle and that select validation data."""
    add_bos: bool = False
    """Begin each document with BOS; EOS ends it in any case."""
    run_bytes: int = 128 << 20
    """Bytes of tokens and ids that a worker collects before it writes a run."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "workers", "shard_tokens", "run_bytes")
        for name in ("val_fraction", "max_reject_fraction"):
            if not 0 <= getattr(self, name) < 1:
                raise BadInput(f"--{name} {getattr(self, name)}: must be at least 0 and below 1")
        if not 0 <= self.seed < 1 << 64:
            raise BadInput(f"--seed {self.seed}: must be at least 0 and below 2^64")


def make_request(settings: BuildSettings, sources: Sequence[SourceFile], fingerprint: str) -> dict[str, Any]:
    """Everything that the bytes of the data set depend on, as JSON types."""
    return {
        "builder": BUILDER_VERSION,
        "tokenizer": fingerprint,
        "text_field": settings.fields.text,
        "id_field": settings.fields.id,
        "seed": settings.seed,
        "val_fraction": settings.val_fraction,
        "shard_tokens": settings.shard_tokens,
        "keep_order": settings.keep_order,
        "add_bos": settings.add_bos,
        "sources": [[source.name, source.bytes, source.mtime_ns] for source in sources],
    }


def find_finished(destination: Path, request: dict[str, Any]) -> dict[str, Any] | None:
    """The summary of the finished data set in `destination`, if any; BadInput if it is of another request."""
    if (destination / WORK).exists() or not (destination / "train" / MANIFEST).exists():
        return None
    summary = read_json(destination / SUMMARY, OWN_JSON_BYTES) if (destination / SUMMARY).exists() else {}
    refuse_other(destination, "a finished data set", destination, summary.get("request", {}), request)
    return summary


def claim(destination: Path, request: dict[str, Any]) -> Lock:
    """Make or find the build folder of the data set that `request` names. Raises as claim_folder does."""
    folders = [destination / WORK / name for name in ("runs", "pieces", "shards")]
    return claim_folder(destination, folders, (SUMMARY, REJECTS), {**request, "pieces": PIECES_VERSION})


def claim_folder(destination: Path, folders: Sequence[Path], names: Sequence[str], request: dict[str, Any]) -> Lock:
    """Make the folders of a build, and its request.json in destination/WORK, or find those of an unfinished one.

    The returned lock keeps other builds out. What killed builds left is swept: in the folders, and of the files `names`
    in `destination`. Raises BadInput if another build is running there or of another request, or if a folder cannot be
    written.
    """
    work = destination / WORK
    try:
        for folder in (work, *folders):
            folder.mkdir(parents=True, exist_ok=True)
        lock = Lock(work / "lock")
    except LockHeld:
        raise BadInput(f"another build is running in {destination}") from None
    except OSError as error:
        if error.errno in NO_ROOM:
            raise
        raise BadInput(f"cannot write to --destination_path {destination}: {error.strerror}") from None
    try:
        for folder in (work, *folders):
            sweep(folder, alone=True)
        for name in names:
            sweep(destination, name, alone=True)
        stored = work / "request.json"
        if stored.exists():
            refuse_other(destination, "an unfinished build", work, read_json(stored, OWN_JSON_BYTES), request)
            log.info("continuing the unfinished build in %s", destination)
        else:
            publish(stored, [json.dumps(request).encode()])
    except BaseException:
        lock.close()
        raise
    return lock


def refuse_other(destination: Path, what: str, leftover: Path, old: dict[str, Any], request: dict[str, Any]) -> None:
    """Raise BadInput where the request differs from `old`, naming the first value that does."""
    old, request = _flat(old), _flat(request)
    differing = [name for name in request if old.get(name) != request[name]]
    if differing:
        name = differing[0]
        values = "" if name == "sources" else f" ({old.get(name)} there, {request[name]} asked for)"
        raise BadInput(
            f"{destination} holds {what} made with other {name}{values}: "
            f"choose another --destination_path, or delete {leftover}"
        )


def _flat(request: dict[str, Any]) -> dict[str, Any]:
    """With the items of a value that is a dictionary in its place."""
    pairs = [value.items() if isinstance(value, dict) else [(name, value)] for name, value in request.items()]
    return {name: value for items in pairs for name, value in items}
