"""The folder state/ of a sharded checkpoint: each rank's part in a file, through torch.distributed.checkpoint.

Reading runs no code, which torch alone does not promise: it unpickles the index `.metadata` and every value that is no
tensor without limits. Here the index may name only the classes an index is made of, and values pass weights_only;
what does not is a `MalformedState`.
A disk that refuses is told as the system's own OSError, which torch.save hides behind a RuntimeError of its own.
"""

from __future__ import annotations

import io
import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, StorageMeta, TensorStorageMetadata

_INDEX_NAMES = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
    ("collections", "OrderedDict"),
}


class MalformedState(ValueError):
    """Files that do not hold the state that is asked for; says what is wrong with them, in one line."""


def write(state: dict[str, Any], folder: Path, group: dist.ProcessGroup | None) -> None:
    """Write the state; all ranks of the group call it, and all raise where one fails. Files are synced to disk."""
    _silence_missing_group()
    dcp.save(state, storage_writer=_Writer(folder), process_group=group, no_dist=group is None)


def read_into(state: dict[str, Any], folder: Path) -> None:
    """Fill the tensors of `state` in place, and replace its other values; each rank reads what it holds."""
    _load(state, folder, no_dist=not dist.is_initialized())


def check_values(folder: Path) -> None:
    """Read every value that is no tensor; asks no other rank."""
    entries = _Reader(folder).read_metadata().state_dict_metadata.items()
    values = {key: None for key, entry in entries if isinstance(entry, BytesStorageMetadata)}
    if values:
        _load(values, folder, no_dist=True)


def tensors(folder: Path, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors whose names begin with `prefix`, without it, one after another; asks no other rank."""
    for key, entry in _Reader(folder).read_metadata().state_dict_metadata.items():
        if key.startswith(prefix) and isinstance(entry, TensorStorageMetadata):
            tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
            _load({key: tensor}, folder, no_dist=True)
            yield key.removeprefix(prefix), tensor


def _load(state: dict[str, Any], folder: Path, *, no_dist: bool) -> None:
    _silence_missing_group()
    try:
        dcp.load(state, storage_reader=_Reader(folder), planner=_Planner(), no_dist=no_dist)
    except CheckpointException as error:  # of all ranks; each raises it
        failure, _ = next(iter(error.failures.values()))
        if isinstance(failure, OSError):
            raise failure from None
        raise MalformedState(f"{folder}: {one_line(failure)}") from None


def one_line(error: BaseException) -> str:
    """What torch says in paragraphs, or the error's class where it says nothing."""
    return " ".join(str(error).split())[:200] or type(error).__name__


@contextmanager
def plain_os_errors() -> Iterator[None]:
    """Raise the OSError that lies behind an error of torch.save's in its place."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def _silence_missing_group() -> None:
    """Without a process group torch warns, at each call, that it is going to do as it was told (no_dist)."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


class _Writer(dcp.FileSystemWriter):
    def __init__(self, folder: Path) -> None:
        # copying ahead would synchronize the thread's stream for each tensor, and that stream is the training's
        super().__init__(folder, per_thread_copy_ahead=0)

    def write_data(self, *arguments: Any, **more: Any) -> Any:
        with plain_os_errors():  # an exception loses its context on the way to the other ranks
            return super().write_data(*arguments, **more)


class _Reader(dcp.FileSystemReader):
    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            try:
                index = _IndexUnpickler(file).load()
            except OSError:
                raise
            except Exception as error:  # noqa: BLE001 - a broken pickle raises whatever class it comes to
                raise MalformedState(f"{self.path}: .metadata: {one_line(error)}") from None
        if not isinstance(index, Metadata):
            raise MalformedState(f"{self.path}: .metadata holds a {type(index).__name__}, not an index")
        index.storage_meta = index.storage_meta or StorageMeta()
        index.storage_meta.load_id = self.load_id
        return index


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(value := getattr(torch, name, None), torch.dtype):
            return value
        known = getattr(metadata, name, None) if module == metadata.__name__ else None
        if isinstance(known, type) and known.__module__ == metadata.__name__:
            return known
        if (module, name) in _INDEX_NAMES:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"names {module}.{name}, which no index of a checkpoint holds")


class _Planner(dcp.DefaultLoadPlanner):
    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        """Hand over a copy of what weights_only lets through: the base class would unpickle anything."""
        clean = io.BytesIO()
        torch.save(torch.load(value, weights_only=True), clean)
        clean.seek(0)
        super().load_bytes(read_item, clean)
