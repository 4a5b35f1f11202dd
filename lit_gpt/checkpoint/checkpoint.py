"""Checkpoints that can be trusted: written under a temporary name, hashed, synced, and published by one rename.

A checkpoint is a folder `iter-XXXXXXXX-ckpt.pth`; the number is the step, whatever the number of processes:

    run.json        facts about the run: model shape, settings, step, slot, data, versions
    state.pth       weights, optimizer and RNG in one file (state_dict_type full), or
    state/          the same, each rank's part in a file of its own (sharded; torch.distributed.checkpoint)
    MANIFEST.json   size and xxh3 of each file above

A folder is damaged if it does not describe itself as record.py says, if a file does not match the manifest, or if the
weights are not those of its model or not finite: it is skipped with a warning, and pruning does not count it. Both
kinds load on any number of processes. Loading runs no code (weights_only, JSON). saver.py says how a running training
saves, history.py which checkpoint of a run is resumed and which are kept.
Cost of publishing: the files are read once more for their hashes, from the page cache.
"""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)

from lit_gpt.checkpoint import full_state, sharded_state
from lit_gpt.checkpoint.record import (
    FULL,
    MANIFEST,
    NAME,
    RUN,
    SAVE,
    SHARDED,
    Checkpoint,
    DamagedCheckpoint,
    described,
    read_manifest,
    require_hash,
)
from lit_gpt.checkpoint.torch_file import MalformedState
from lit_gpt.cli import BadInput
from lit_gpt.config import Config
from lit_gpt.files import discard, fsync, publishing_new, rename, xxh3
from lit_gpt.model.gpt import GPT

log = logging.getLogger(__name__)

HASHED_AT_ONCE = 8
"""Files; one thread reads some 4 GB/s from the page cache."""

# Publishing


def seal(temporary: Path, final: Path, facts: dict[str, Any]) -> None:
    """Publish `temporary`, which holds the state, as the checkpoint `final`: add run.json, hash, sync, rename."""
    _describe(temporary, facts)
    fsync(temporary)
    if final.exists():
        log.warning("replacing %s: it is damaged, or of a branch that the run has left", final)
        remove(final)
    rename(temporary, final)


def _describe(temporary: Path, facts: dict[str, Any]) -> None:
    """Add run.json and MANIFEST.json to the folder of a state."""
    (temporary / RUN).write_text(json.dumps(facts, indent=1))
    files = sorted(path for path in temporary.rglob("*") if path.is_file())
    with ThreadPoolExecutor(HASHED_AT_ONCE) as threads:
        hashes = threads.map(xxh3, files)
        listing = {
            str(path.relative_to(temporary)): {"bytes": path.stat().st_size, "xxh3": found}
            for path, found in zip(files, hashes, strict=True)
        }
    (temporary / MANIFEST).write_text(json.dumps(listing, indent=1))


def temporary_path(final: Path) -> Path:
    """Where a checkpoint is written before it is published: one folder for all ranks, so not named by host and pid."""
    return final.with_name(f".saving-{final.name}")


def write_initial(path: Path, config: Config, tensors: Iterable[tuple[str, Tensor]], facts: dict[str, Any]) -> Path:
    """Publish a step-0 checkpoint `path`, which must not exist, of the weights `tensors` (name, tensor), without
    optimizer state.

    Costs: memory for one weight at a time; for a while, disk for all weights twice.
    """
    with publishing_new(path, folder=True) as temporary:
        mapped = temporary / "mapped"
        mapped.mkdir()
        full_state.write(
            {"model": {name: _mapped(tensor, mapped / name) for name, tensor in tensors}}, temporary / FULL
        )
        discard(mapped)
        _describe(temporary, {**facts, "model": asdict(config)})
    return path


def _mapped(tensor: Tensor, path: Path) -> Tensor:
    """The tensor as a mapping of a new file, whose pages the system may drop."""
    path.write_bytes(tensor.reshape(-1).view(torch.uint8).numpy().data)
    whole = torch.from_file(str(path), shared=True, size=tensor.numel(), dtype=tensor.dtype)
    return whole.view(tensor.shape)


def training_state(model: nn.Module, optimizer: torch.optim.Optimizer, *, full: bool, to_host: bool) -> dict[str, Any]:
    """Weights, optimizer and RNG under the names of a checkpoint; what is not gathered are the live tensors themselves.

    full: whole tensors instead of this rank's shards; with to_host, on rank 0 alone, in host memory.
    """
    options = StateDictOptions(full_state_dict=full, cpu_offload=to_host)
    weights, optimizer_state = get_state_dict(unwrapped(model), optimizer, options=options)
    return {"model": weights, "optimizer": optimizer_state, "rng": torch.get_rng_state()}


def remove(path: Path) -> None:
    """Remove a checkpoint; a kill on the way leaves nothing that looks like a checkpoint."""
    doomed = path.with_name(f".removing-{path.name}")
    discard(doomed)
    path.rename(doomed)
    discard(doomed)


def is_whole(path: Path) -> bool:
    """Whether the checkpoint describes itself, and every file has its size; hashes are checked by `verified`."""
    try:
        described(path)
    except DamagedCheckpoint:
        return False
    return True


# Checking


def verified(path: Path, *, part: bool = False) -> Checkpoint:
    """The checkpoint at `path`; DamagedCheckpoint unless every file has the manifest's size and hash, the weights are
    those of its model and finite, and all else is plain values. part: it may be one node's (memory.py).

    Cost: the files are read once for their hashes, the weights once more from the page cache.
    """
    found = described(path)
    manifest = read_manifest(path)
    with ThreadPoolExecutor(HASHED_AT_ONCE) as threads:
        list(threads.map(require_hash, itertools.repeat(path), manifest, manifest.values()))
    try:
        _require_weights(found, part=part)
        if not (path / FULL).is_file():
            sharded_state.check_values(path / SHARDED, part=part)
    except MalformedState as error:
        raise DamagedCheckpoint(f"{path} holds more than tensors and plain values; it was not run: {error}") from None
    except OSError as error:
        raise DamagedCheckpoint(f"{path} cannot be read: {error.strerror}") from None
    return found


def _require_weights(checkpoint: Checkpoint, *, part: bool) -> None:
    """Raise DamagedCheckpoint unless the weights are finite and have the names and shapes of the checkpoint's model."""
    shapes = {}
    for name, tensor in model_tensors(checkpoint, part=part):
        if not tensor.is_floating_point():
            raise DamagedCheckpoint(f"{checkpoint.path} holds a weight of {tensor.dtype}: {name}")
        if tensor.numel() and not all(torch.isfinite(x) for x in torch.aminmax(tensor)):  # NaN spreads to both
            raise DamagedCheckpoint(f"{checkpoint.path} holds weights that are not finite numbers: {name}")
        shapes[name] = tuple(tensor.shape)
    config = checkpoint.config
    differs = ""
    if config.n_layer < len(shapes):  # a model of more layers is not even described
        with torch.device("meta"):
            wanted = {name: tuple(weight.shape) for name, weight in GPT(config).state_dict().items()}
        if shapes == wanted:
            return
        differs = f": '{min(shapes.items() ^ wanted.items())[0]}' is missing, unknown or of another shape"
    message = f"the {len(shapes)} weights are not those of the model in {RUN}{differs}"
    raise DamagedCheckpoint(f"{checkpoint.path}: {message}")


def newest_first(run_dir: Path) -> list[Path]:
    """The folders that are named as checkpoints, whole or damaged."""
    return sorted((path for path in run_dir.glob("iter-*") if NAME.fullmatch(path.name)), reverse=True)


def names(run_dir: Path) -> str:
    """The names of a run folder's checkpoints, for a message."""
    return ", ".join(path.name for path in newest_first(run_dir)) or "no checkpoint"


# Loading


def load(checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Load the state into model and optimizer, from either kind, on any number of processes.

    The optimizer keeps its own options (learning rate, weight decay, betas, eps, fused ...): they are the run's
    settings, and those that were saved are not taken. Raises BadInput if the checkpoint is of another model or another
    optimizer.
    """
    inner = unwrapped(model)
    require_model(checkpoint, inner.config)
    path = checkpoint.path
    full = (path / FULL).is_file()
    try:
        if full and not full_state.has_optimizer(path / FULL):  # an imported model: the optimizer starts afresh
            full_state.read_into({"model": get_model_state_dict(inner)}, path / FULL)
            return
        state = training_state(model, optimizer, full=False, to_host=False)
        own = state["optimizer"]["param_groups"]
        state["optimizer"]["param_groups"] = [{"params": list(group["params"])} for group in own]
        if full:
            full_state.read_into(state, path / FULL)
        else:
            sharded_state.read_into(state, path / SHARDED, part=SAVE in checkpoint.facts)
        _set_rng_state(state["rng"])
    except MalformedState as error:
        raise BadInput(f"{path} is not what this run could have saved: {error}") from None
    state["optimizer"]["param_groups"] = own
    set_state_dict(inner, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


def _set_rng_state(state: Tensor) -> None:
    try:
        torch.set_rng_state(state)
    except RuntimeError as error:
        raise MalformedState(f"rng: {error}") from None


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """The weights by their names in a checkpoint, as this rank holds them."""
    return {
        name: tensor for name, tensor in get_model_state_dict(unwrapped(model)).items() if isinstance(tensor, Tensor)
    }


def require_model(checkpoint: Checkpoint, config: Config) -> None:
    """Raise BadInput if the checkpoint is of another model; says what differs."""
    if config != checkpoint.config:
        there = checkpoint.facts["model"]
        raise BadInput(
            f"{checkpoint.path} is a checkpoint of another model: "
            + ", ".join(f"{k} is {there[k]} there, {v} here" for k, v in asdict(config).items() if v != there[k])
        )


def model_tensors(checkpoint: Checkpoint, *, part: bool = False) -> Iterator[tuple[str, Tensor]]:
    """The weights (name, tensor), one after another, on the CPU. Cost: memory for one at a time, from either kind.

    part: the checkpoint may be one node's; 0 stands for what others hold."""
    path = checkpoint.path
    if (path / FULL).is_file():
        yield from full_state.weights(path / FULL)
        return
    yield from sharded_state.tensors(path / SHARDED, "model.", part=part)


# Small parts


def unwrapped(model: nn.Module) -> Any:
    """The GPT inside Fabric's wrapper."""
    return getattr(model, "module", model)
