"""What a checkpoint says of itself: MANIFEST.json and run.json, parsed into a schema.

    MANIFEST.json   size and xxh3 of each other file
    run.json        facts about the run: model shape, settings, step, slot, data, versions

Invariants: `described` returns only what both files say in their schema, of files that have the listed sizes, in a
folder whose name has the same step; anything else is a DamagedCheckpoint, whatever the bytes are. run.json is also
compared with its hash, and the manifest must list every file of the state. So one wrong bit in either file is found,
that in another file's hash by `checkpoint.verified` only.
Costs: two small files are read, and one `stat` a file; the state itself is for `checkpoint.verified`.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, NamedTuple, TypedDict

import msgspec
import xxhash

from lit_gpt.cli import BadInput
from lit_gpt.config import Config
from lit_gpt.files import OWN_JSON_BYTES, read_json, xxh3

NAME = re.compile(r"iter-(\d{8})-ckpt\.pth")
RUN, MANIFEST, FULL, SHARDED = "run.json", "MANIFEST.json", "state.pth", "state"
INDEX = f"{SHARDED}/.metadata"
SAVE = "save"
"""Of a checkpoint in node memory, the fact that is the same in all nodes' parts of it, and in no others: an id."""

Count = Annotated[int, msgspec.Meta(ge=0)]
Positive = Annotated[int, msgspec.Meta(ge=1)]
Digest = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{16}$")]
Paths = str | list[str]


class FileEntry(TypedDict):
    """A file, in the manifest."""

    bytes: Count
    xxh3: Digest


class MarkFields(TypedDict):
    """datapoints.log.Mark."""

    attempt: Count
    step: Count
    bytes: Count
    xxh3: Digest


class GuardFields(TypedDict):
    """StepGuard.state."""

    skipped: Count
    in_a_row: Count
    recent_norms: list[float]


class PartFields(TypedDict):
    """A checkpoint in an average."""

    step: Count
    weight: float
    state_xxh3: Digest


class AverageFields(TypedDict):
    """What average.py made the weights of, oldest first."""

    half_life_steps: float | None
    checkpoints: list[PartFields]


class _Needed(TypedDict):
    step: Count
    slot: Count
    tokens: Count
    settings: dict[str, Any]
    model: Config


class Facts(_Needed, total=False):
    """run.json; what RunState.checkpoint_facts gives, and the model. An imported model has little of it."""

    datapoint_log: MarkFields | None
    step_guard: GuardFields
    left_out: list[tuple[Count, Count]]
    slot_facts: dict[str, Any]
    data_from_step: Count
    rows: Count
    resolved: dict[str, Any]
    environment: dict[str, Any]
    dataset_id: Paths
    train_data_dir: Paths
    val_data_dir: str | None
    val_dataset_id: str | None
    tokenizer_path: str | None
    tokenizer_fingerprint: str
    world_size: Positive
    average: AverageFields
    save: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{14}$")]


class DamagedCheckpoint(ValueError):
    """A checkpoint is not what was saved; says which file, and what differs."""


class Checkpoint(NamedTuple):
    """A checkpoint on disk."""

    path: Path
    facts: dict[str, Any]
    """The content of run.json: see Facts."""

    @property
    def step(self) -> int:
        """Updates done."""
        return self.facts["step"]

    @property
    def config(self) -> Config:
        return Config(**self.facts["model"])

    @property
    def state_xxh3(self) -> str:
        """Identifies the trained state: a hash of the manifest without run.json. Raises DamagedCheckpoint."""
        files = {name: entry for name, entry in read_manifest(self.path).items() if name != RUN}
        return xxhash.xxh3_64_hexdigest(json.dumps(files, sort_keys=True).encode())


def checkpoint_name(step: int) -> str:
    return f"iter-{step:08d}-ckpt.pth"


def described(path: Path) -> Checkpoint:
    """The checkpoint at `path` as it describes itself; raises DamagedCheckpoint. The state is not read."""
    manifest = read_manifest(path)
    for name, entry in manifest.items():
        found = _size(path / name)
        if found != entry["bytes"]:
            said = "missing" if found is None else f"{found} bytes"
            raise DamagedCheckpoint(f"{path / name} is {said}, saved as {entry['bytes']} bytes")
    for name in _state_files(path):
        if name not in manifest:
            raise DamagedCheckpoint(f"{path / name} is not in {MANIFEST}: it was not saved with this checkpoint")
    require_hash(path, RUN, manifest[RUN])
    facts = _parsed(path / RUN, Facts)
    if unknown := facts["model"].keys() - Config.__dataclass_fields__.keys():
        raise DamagedCheckpoint(f"{path / RUN}: the model has a field {min(unknown)}, which this program does not know")
    if NAME.fullmatch(path.name) and path.name != checkpoint_name(facts["step"]):
        raise DamagedCheckpoint(f"{path / RUN} is of step {facts['step']}, which is not that of the folder's name")
    return Checkpoint(path, facts)


def read_manifest(path: Path) -> dict[str, FileEntry]:
    """The manifest of the checkpoint at `path`; raises DamagedCheckpoint."""
    if not os.path.isfile(path / MANIFEST):  # Path.is_file may raise
        if inside := [found.name for found in path.glob("iter-*") if NAME.fullmatch(found.name)]:
            raise DamagedCheckpoint(f"{path} is a run folder, not a checkpoint; its newest is {path / max(inside)}")
        raise DamagedCheckpoint(f"{path} has no {MANIFEST}: not a checkpoint of this project, or never finished")
    manifest: dict[str, FileEntry] = _parsed(path / MANIFEST, dict[str, FileEntry])
    for name in manifest:
        parts = PurePosixPath(name).parts
        if ".." in parts or name.startswith("/") or "\0" in name:
            raise DamagedCheckpoint(f"{path / MANIFEST} names a file outside the checkpoint: {name!r}")
    if RUN not in manifest or (FULL in manifest) == (INDEX in manifest):
        raise DamagedCheckpoint(f"{path / MANIFEST} must list {RUN}, and either {FULL} or {INDEX}")
    return manifest


def require_hash(path: Path, name: str, entry: FileEntry) -> None:
    """Raise DamagedCheckpoint unless the file `name` of the checkpoint at `path` has the hash of its entry."""
    try:
        digest = xxh3(path / name)
    except OSError as error:
        raise DamagedCheckpoint(f"{path / name} cannot be read: {error.strerror}") from None
    if digest != entry["xxh3"]:
        raise DamagedCheckpoint(f"{path / name} is corrupt: xxh3 {digest}, saved as {entry['xxh3']}")


def _parsed(path: Path, schema: Any) -> dict[str, Any]:
    try:
        value = read_json(path, OWN_JSON_BYTES)
        msgspec.convert(value, schema)
    except BadInput as error:
        raise DamagedCheckpoint(str(error)) from None
    except msgspec.ValidationError as error:
        raise DamagedCheckpoint(f"{path} is not what was saved: {error}") from None
    return value


def _size(path: Path) -> int | None:
    """Bytes of a file; None if it is missing, or cannot be looked at."""
    try:
        return path.stat().st_size if path.is_file() else None
    except OSError:
        return None


def _state_files(path: Path) -> list[str]:
    """Names of the files that a reader may take for part of the state; not what NFS keeps of a removed one."""
    found = [path / FULL] if (path / FULL).exists() else []
    found += [file for file in (path / SHARDED).glob("*") if not file.name.startswith(".nfs")]
    return [str(file.relative_to(path)) for file in found]
