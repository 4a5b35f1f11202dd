"""state/ of a sharded checkpoint: each rank's part in a file, through torch.distributed.checkpoint (DCP).

Reading runs no code. DCP alone does not ensure that: it unpickles its index `.metadata`, and every value that is not a
tensor, without limits. Here the index may name only the classes of an index, and values are loaded with weights_only;
anything else raises MalformedState.
A failing disk raises the system's OSError, which torch.save hides behind a RuntimeError.
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
    """The files do not hold the expected state; says what is wrong with them, in one line."""


def write(state: dict[str, Any], folder: Path, group: dist.ProcessGroup | None) -> None:
    """Write the state and sync its files; all ranks of the group call it, and all raise if one fails.

    Raises CheckpointException (or OSError, without a group).
    """
    _silence_missing_group()
    dcp.save(state, storage_writer=_Writer(folder), process_group=group, no_dist=group is None)


def read_into(state: dict[str, Any], folder: Path) -> None:
    """Fill the tensors of `state` in place, and replace its other values; each rank reads the part it holds.

    Raises MalformedState if the files do not hold this state.
    """
    _load(state, folder, no_dist=not dist.is_initialized())


def check_values(folder: Path) -> None:
    """Raise MalformedState unless every value that is not a tensor is a plain one. Needs no other rank."""
    entries = _Reader(folder).read_metadata().state_dict_metadata.items()
    values = {key: None for key, entry in entries if isinstance(entry, BytesStorageMetadata)}
    if values:
        _load(values, folder, no_dist=True)


def tensors(folder: Path, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors whose names begin with `prefix`, which is cut off, one after another. Needs no other rank."""
    for key, entry in _Reader(folder).read_metadata().state_dict_metadata.items():
        if key.startswith(prefix) and isinstance(entry, TensorStorageMetadata):
            tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
            _load({key: tensor}, folder, no_dist=True)
            yield key.removeprefix(prefix), tensor


def _load(state: dict[str, Any], folder: Path, *, no_dist: bool) -> None:
    _silence_missing_group()
    try:
        dcp.load(state, storage_reader=_Reader(folder), planner=_Planner(), no_dist=no_dist)
    except CheckpointException as error:  # holds the failures of all ranks, and is raised on each
        failure, _ = next(iter(error.failures.values()))
        if isinstance(failure, OSError):
            raise failure from None
        raise MalformedState(f"{folder}: {one_line(failure)}") from None


def one_line(error: BaseException) -> str:
    """The error's message in one line, or its class where there is no message."""
    return " ".join(str(error).split())[:200] or type(error).__name__


@contextmanager
def plain_os_errors() -> Iterator[None]:
    """Raise the OSError behind torch.save's RuntimeError instead of that."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def _silence_missing_group() -> None:
    """Without a process group torch warns, at each call, that it does without, though no_dist asks for that."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


class _Writer(dcp.FileSystemWriter):
    def __init__(self, folder: Path) -> None:
        # copying ahead would synchronize the thread's current stream, which is the training's, at each tensor
        super().__init__(folder, per_thread_copy_ahead=0)

    def write_data(self, *arguments: Any, **more: Any) -> Any:
        with plain_os_errors():  # exceptions lose their context when they are sent to the other ranks
            return super().write_data(*arguments, **more)


class _Reader(dcp.FileSystemReader):
    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            try:
                index = _IndexUnpickler(file).load()
            except OSError:
                raise
            except Exception as error:  # noqa: BLE001 - a broken pickle may raise any class
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
        """Load with weights_only, and hand the base class, which would unpickle anything, a copy of the result."""
        clean = io.BytesIO()
        torch.save(torch.load(value, weights_only=True), clean)
        clean.seek(0)
        super().load_bytes(read_item, clean)
