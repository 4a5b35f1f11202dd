"""state/ of a sharded checkpoint: each rank's part in a file, through torch.distributed.checkpoint (DCP).

Reading runs no code. DCP alone does not ensure that: it unpickles its index `.metadata`, and every value that is not a
tensor, without limits. Here the index may name only the classes of an index, and values are loaded with weights_only;
nor may the index state a size or an offset beyond the files, or a file elsewhere. Anything else raises MalformedState.
A failing disk raises the system's OSError, which torch.save hides behind a RuntimeError.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from lit_gpt.checkpoint.torch_file import MalformedState, one_line, require_plain, scanned

_INDEX_NAMES = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
    ("collections", "OrderedDict"),
}
_INDEX_BYTES = 1 << 20
"""An index may be that large, or as large as the files beside it, in which each of its entries has some 1,000 bytes."""


def write(state: dict[str, Any], folder: Path, group: dist.ProcessGroup | None) -> None:
    """Write the state and sync its files; all ranks of the group call it, and all raise if one fails.

    Raises CheckpointException (or OSError, without a group).
    """
    _silence_missing_group()
    dcp.save(state, storage_writer=_Writer(folder), process_group=group, no_dist=group is None)


def read_into(state: dict[str, Any], folder: Path, *, part: bool = False) -> None:
    """Fill the tensors of `state` in place, and replace its other values; each rank reads the part it holds.

    part: the files are of this node only, and hold this rank's part (missing_part). Raises MalformedState if the files
    do not hold this state.
    """
    _load(state, _Reader(folder, part=part), no_dist=part or not dist.is_initialized())


def missing_part(weights: Mapping[str, Tensor], folder: Path, prefix: str) -> str | None:
    """The name of a weight that is not whole in the files, and of which this rank's part is none of theirs; else None.

    weights: by name, without the prefix that the files' names have. Raises MalformedState.
    """
    entries = _read_index(folder, part=True).state_dict_metadata
    for name, weight in weights.items():
        own: tuple[Any, Any] = (tuple(weight.shape), (0,) * weight.dim())
        if isinstance(weight, DTensor):
            own = compute_local_shape_and_global_offset(weight.shape, weight.device_mesh, weight.placements)
        entry = entries.get(prefix + name)
        chunks = entry.chunks if isinstance(entry, TensorStorageMetadata) else []
        if chunks and sum(math.prod(chunk.sizes) for chunk in chunks) == weight.numel():
            continue
        if math.prod(own[0]) and own not in [(tuple(chunk.sizes), tuple(chunk.offsets)) for chunk in chunks]:
            return name
    return None


def check_values(folder: Path, *, part: bool = False) -> None:
    """Raise MalformedState unless every value that is not a tensor is a plain one. Needs no other rank."""
    reader = _Reader(folder, part=part)
    entries = reader.read_metadata().state_dict_metadata.items()
    values = {key: None for key, entry in entries if isinstance(entry, BytesStorageMetadata)}
    if values:
        _load(values, reader, no_dist=True)


def tensors(folder: Path, prefix: str, *, part: bool = False) -> Iterator[tuple[str, Tensor]]:
    """The tensors whose names begin with `prefix`, which is cut off, one after another; 0 in place of what other nodes
    hold. Needs no other rank."""
    reader = _Reader(folder, part=part)
    for key, entry in reader.read_metadata().state_dict_metadata.items():
        if key.startswith(prefix) and isinstance(entry, TensorStorageMetadata):
            tensor = (torch.zeros if part else torch.empty)(entry.size, dtype=entry.properties.dtype)
            _load({key: tensor}, reader, no_dist=True)
            yield key.removeprefix(prefix), tensor


def _load(state: dict[str, Any], reader: _Reader, *, no_dist: bool) -> None:
    _silence_missing_group()
    try:
        dcp.load(state, storage_reader=reader, planner=_Planner(), no_dist=no_dist)
    except CheckpointException as error:  # holds the failures of all ranks, and is raised on each
        failure, _ = next(iter(error.failures.values()))
        if isinstance(failure, OSError):
            raise failure from None
        raise MalformedState(f"{reader.path}: {one_line(failure)}") from None


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
    """Reads the index once, and looks into each part before it is loaded."""

    _index: Metadata | None = None

    def __init__(self, folder: Path, *, part: bool) -> None:
        """part: the files may hold a part of the state."""
        super().__init__(folder)
        self._part = part

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        if self._index is None:
            self._index = _read_index(Path(self.path), part=self._part)
        self._index.storage_meta = StorageMeta(load_id=self.load_id)
        return self._index

    def _slice_file(self, file: Any, sinfo: _StorageInfo) -> IO[bytes]:
        part = cast(IO[bytes], _Part(file, sinfo.offset, sinfo.length))
        require_plain(part)
        return part


class _Part(io.RawIOBase):
    """A part of an open file as a file; torch's own view seeks from the end in the wrong direction."""

    def __init__(self, file: IO[bytes], start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = max(0, offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence])
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._start + self._at)
        data = self._file.read(min(len(buffer), max(0, self._length - self._at)))
        memoryview(buffer).cast("B")[: len(data)] = data
        self._at += len(data)
        return len(data)


def _read_index(folder: Path, *, part: bool) -> Metadata:
    sizes = {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()}
    try:
        if sizes[".metadata"] > max(_INDEX_BYTES, sum(sizes.values()) - sizes[".metadata"]):
            raise MalformedState(f"{sizes['.metadata']} bytes, more than all parts")
        content = (folder / ".metadata").read_bytes()
        for _ in scanned(io.BytesIO(content)):
            pass
        index = _IndexUnpickler(io.BytesIO(content)).load()
        _require_index(index, sizes, part=part)
    except OSError:
        raise
    except Exception as error:  # noqa: BLE001 - a broken pickle may raise any class
        raise MalformedState(f"{folder}: .metadata: {one_line(error)}") from None
    return index


def _require_index(index: Any, sizes: dict[str, int], *, part: bool) -> None:
    """Raise MalformedState, or what an attribute of another type raises, unless all that it states is in the files."""
    if not isinstance(index, Metadata):
        raise MalformedState(f"it holds a {type(index).__name__}, not an index")
    for key, entry in index.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            _require_tensor(key, entry, sum(sizes.values()), part=part)
        elif not isinstance(entry, BytesStorageMetadata) or not isinstance(key, str):
            raise MalformedState(f"{str(key)[:80]!r} is a {type(entry).__name__}, neither tensor nor value")
    for where, stored in index.storage_data.items():
        if not isinstance(where, MetadataIndex) or not isinstance(stored, _StorageInfo):
            raise MalformedState(f"a part is a {type(stored).__name__}")
        if not 0 <= stored.offset <= stored.offset + stored.length <= sizes.get(stored.relative_path, -1):
            raise MalformedState(f"a part of {where.fqn!r} is not in {str(stored.relative_path)[:80]!r}")
        if stored.transform_descriptors:
            raise MalformedState(f"a part of {where.fqn!r} is compressed")


def _require_tensor(key: Any, entry: TensorStorageMetadata, file_bytes: int, *, part: bool) -> None:
    dtype = entry.properties.dtype if isinstance(entry.properties, TensorProperties) else None
    if not isinstance(key, str) or not isinstance(dtype, torch.dtype) or not isinstance(entry.size, torch.Size):
        raise MalformedState(f"{str(key)[:80]!r} is not a tensor")
    if min(entry.size, default=0) < 0 or (entry.size.numel() * dtype.itemsize > file_bytes and not part):
        raise MalformedState(f"{key!r} of shape {tuple(entry.size)} exceeds the files")
    for chunk in entry.chunks:
        if not isinstance(chunk, ChunkStorageMetadata) or not len(chunk.offsets) == len(chunk.sizes) == len(entry.size):
            raise MalformedState(f"{key!r} has a chunk of other dimensions")
        for start, length, whole in zip(chunk.offsets, chunk.sizes, entry.size, strict=True):
            if not 0 <= start <= start + length <= whole:
                raise MalformedState(f"{key!r} has a chunk beyond its shape")
    held = sum(math.prod(chunk.sizes) for chunk in entry.chunks)
    if held * dtype.itemsize > file_bytes or (held < entry.size.numel() and not part):
        raise MalformedState(f"{held} of the {entry.size.numel()} numbers of {key!r} are in the files")


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
