"""Checkpoints that can be trusted: written under a temporary name, hashed, synced, and published by one rename.

A checkpoint is a folder `iter-XXXXXXXX-ckpt.pth`; the number is the step, whatever the number of processes:

    run.json        what the run was: model shape, settings, step, slot, data, versions; JSON, no code
    state.pth       weights, optimizer and RNG in one file (state_dict_type full), or
    state/          the same, each rank's part in a file of its own (sharded; torch.distributed.checkpoint)
    MANIFEST.json   size and xxh3 of each file above

A folder without a manifest, or with a file that does not match it, is no checkpoint: it is skipped with a warning and
never counted by pruning. Either kind loads on any number of processes. Loading runs no code (weights_only, JSON).
Cost of a save beside the writing: one more read of the files for their hashes, from the page cache.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import xxhash
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)

from lit_gpt.cli import BadInput
from lit_gpt.config import Config

log = logging.getLogger(__name__)

NAME = re.compile(r"iter-(\d{8})-ckpt\.pth")
RUN, MANIFEST, FULL, SHARDED = "run.json", "MANIFEST.json", "state.pth", "state"
_HASH_CHUNK_BYTES = 16 << 20


class DamagedCheckpoint(ValueError):
    """A checkpoint that is not what was saved; says which file, and what differs."""


class Checkpoint(NamedTuple):
    """A checkpoint on disk and the facts in its run.json."""

    path: Path
    facts: dict[str, Any]

    @property
    def step(self) -> int:
        """Updates done."""
        return self.facts["step"]

    @property
    def config(self) -> Config:
        return Config(**self.facts["model"])


def checkpoint_name(step: int) -> str:
    return f"iter-{step:08d}-ckpt.pth"


# Saving


def save(
    run_dir: Path, facts: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer, *, full: bool
) -> Path:
    """Publish the state after `facts["step"]` updates; every rank calls it, and returns when the folder is published.

    `facts` goes to run.json on rank 0 and must be plain JSON; the model's shape is added to it.
    """
    final = run_dir / checkpoint_name(facts["step"])
    temporary = run_dir / f".saving-{final.name}"
    if _rank() == 0:
        shutil.rmtree(temporary, ignore_errors=True)  # left over by a save that was killed
        temporary.mkdir(parents=True)
    _barrier()
    state = _state(model, optimizer, full=full)
    if not full:
        dcp.save(state, checkpoint_id=temporary / SHARDED, no_dist=not dist.is_initialized())
    elif _rank() == 0:
        torch.save(state, temporary / FULL)
    if _rank() == 0:
        _publish(temporary, final, {**facts, "model": asdict(_unwrapped(model).config)})
    _barrier()
    return final


def write_initial(path: Path, config: Config, tensors: Iterable[tuple[str, Tensor]], facts: dict[str, Any]) -> Path:
    """Publish in the folder `path` a step-0 checkpoint, without optimizer state, of weights from elsewhere."""
    temporary = path.parent / f".saving-{path.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    torch.save({"model": dict(tensors)}, temporary / FULL)
    _publish(temporary, path, {**facts, "model": asdict(config)})
    return path


def _state(model: nn.Module, optimizer: torch.optim.Optimizer, *, full: bool) -> dict[str, Any]:
    options = StateDictOptions(full_state_dict=full, cpu_offload=full)
    weights, optimizer_state = get_state_dict(_unwrapped(model), optimizer, options=options)
    return {"model": weights, "optimizer": optimizer_state, "rng": torch.get_rng_state()}


def _publish(temporary: Path, final: Path, facts: dict[str, Any]) -> None:
    (temporary / RUN).write_text(json.dumps(facts, indent=1))
    files = sorted(path for path in temporary.rglob("*") if path.is_file())
    for path in files:
        _sync(path)
    listing = {str(path.relative_to(temporary)): {"bytes": path.stat().st_size, "xxh3": _hash(path)} for path in files}
    (temporary / MANIFEST).write_text(json.dumps(listing, indent=1))
    for path in (temporary / MANIFEST, temporary / SHARDED, temporary):
        if path.exists():
            _sync(path)
    if final.exists():  # a damaged one, or the run was wound back: the new one takes its place
        _remove(final)
    temporary.rename(final)
    _sync(final.parent)


def _remove(path: Path) -> None:
    """Remove a checkpoint so that a kill in the middle leaves nothing that looks like half of one."""
    doomed = path.with_name(f".removing-{path.name}")
    path.rename(doomed)
    shutil.rmtree(doomed)


def prune(run_dir: Path, keep_last: int) -> None:
    """Remove all but the newest keep_last whole checkpoints (0 keeps all), and what killed saves left behind.

    Damaged ones are not counted and not removed: they are for a person to look at.
    """
    for left_over in (*run_dir.glob(".saving-iter-*"), *run_dir.glob(".removing-iter-*")):
        shutil.rmtree(left_over)
    if keep_last == 0:
        return
    whole = [path for path in _newest_first(run_dir) if (path / MANIFEST).is_file() and _size_mismatch(path) is None]
    for path in whole[keep_last:]:
        _remove(path)


# Finding and checking


def find(resume: str, run_dir: Path) -> Checkpoint | None:
    """The checkpoint that --resume names: a folder or a file in it; "auto": the newest whole one, or None.

    Raises BadInput if a named one is missing or damaged; damaged ones that "auto" passes over are warned about.
    """
    if resume != "auto":
        path = Path(resume)
        path = path.parent if path.is_file() else path
        if not path.is_dir():
            raise BadInput(f"--resume {resume}: no such checkpoint. In {run_dir}: {_names(run_dir)}")
        try:
            return verified(path)
        except DamagedCheckpoint as error:
            raise BadInput(f"--resume {resume}: {error}. In {run_dir}: {_names(run_dir)}") from None
    for path in _newest_first(run_dir):
        try:
            return verified(path)
        except DamagedCheckpoint as error:
            log.warning("passing over %s: %s", path, error)
    return None


def refuse_used(run_dir: Path) -> None:
    """Refuse a fresh start in a folder that holds checkpoints: they would be mixed with the new run's, and pruned."""
    if _newest_first(run_dir):
        raise BadInput(
            f"{run_dir} holds a run already ({_names(run_dir)}): go on by --resume auto, or choose another --out_dir"
        )


def verified(path: Path) -> Checkpoint:
    """The checkpoint at `path` after every file matched the manifest's size and hash; raises DamagedCheckpoint."""
    if mismatch := _size_mismatch(path):
        raise DamagedCheckpoint(mismatch)
    for name, entry in _manifest(path).items():
        if (found := _hash(path / name)) != entry["xxh3"]:
            raise DamagedCheckpoint(f"{path / name} is corrupt: xxh3 {found}, saved as {entry['xxh3']}")
    return Checkpoint(path, json.loads((path / RUN).read_text()))


def _manifest(path: Path) -> dict[str, dict[str, Any]]:
    try:
        return json.loads((path / MANIFEST).read_text())
    except FileNotFoundError:
        raise DamagedCheckpoint(
            f"{path} has no {MANIFEST}: not a checkpoint of this project, or never finished"
        ) from None
    except ValueError:
        raise DamagedCheckpoint(f"{path / MANIFEST} is not JSON") from None


def _size_mismatch(path: Path) -> str | None:
    for name, entry in _manifest(path).items():
        found = (path / name).stat().st_size if (path / name).is_file() else None
        if found != entry["bytes"]:
            return (
                f"{path / name} is {'missing' if found is None else f'{found} bytes'}, saved as {entry['bytes']} bytes"
            )
    return None


def _newest_first(run_dir: Path) -> list[Path]:
    return sorted((path for path in run_dir.glob("iter-*") if NAME.fullmatch(path.name)), reverse=True)


def _names(run_dir: Path) -> str:
    return ", ".join(path.name for path in _newest_first(run_dir)) or "no checkpoint"


# Loading


def load(checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put the checkpoint's state into model and optimizer, on any number of processes, from either kind."""
    inner = _unwrapped(model)
    if inner.config != checkpoint.config:
        differs = [k for k, v in asdict(inner.config).items() if v != checkpoint.facts["model"][k]]
        raise BadInput(
            f"{checkpoint.path} is a checkpoint of another model: "
            + ", ".join(
                f"{k} is {checkpoint.facts['model'][k]} there, {getattr(inner.config, k)} here" for k in differs
            )
        )
    full = (checkpoint.path / FULL).is_file()
    if full:
        state = torch.load(checkpoint.path / FULL, map_location="cpu", weights_only=True, mmap=True)
    else:
        state = _state(model, optimizer, full=False)
        dcp.load(state, checkpoint_id=checkpoint.path / SHARDED, no_dist=not dist.is_initialized())
    options = StateDictOptions(full_state_dict=full, cpu_offload=full)
    if "optimizer" not in state:  # an imported model: its optimizer starts afresh
        set_model_state_dict(inner, state["model"], options=options)
        return
    set_state_dict(
        inner, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=options
    )
    torch.set_rng_state(state["rng"])


def model_tensors(checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    """The weights, one after another on the CPU; memory holds one at a time, whatever the kind of checkpoint."""
    path = checkpoint.path
    if (path / FULL).is_file():
        state = torch.load(path / FULL, map_location="cpu", weights_only=True, mmap=True)["model"]
        yield from state.items()
        return
    metadata = dcp.FileSystemReader(path / SHARDED).read_metadata().state_dict_metadata
    for key, entry in metadata.items():
        if key.startswith("model.") and isinstance(entry, TensorStorageMetadata):
            tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
            dcp.load({key: tensor}, checkpoint_id=path / SHARDED, no_dist=True)
            yield key.removeprefix("model."), tensor


# Small parts


def _unwrapped(model: nn.Module) -> Any:
    """The GPT inside Fabric's wrapper."""
    return getattr(model, "module", model)


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def _hash(path: Path) -> str:
    digest = xxhash.xxh3_64()
    with path.open("rb") as file:
        while chunk := file.read(_HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
