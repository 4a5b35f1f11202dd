"""The weights of a Hugging Face model folder: written as a stream, read one by one.

A safetensors file is an 8-byte header length, a JSON header, then the bytes of all tensors. All shapes are known before
the first weight arrives, so the headers are written first and each weight goes straight to its offset. Weights are read
from safetensors files, or from the older .bin through torch's weights_only loader; nothing in a folder is executed.
Cost: memory for one weight.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
import xxhash
from safetensors import safe_open
from torch import Tensor

from lit_gpt.checkpoint import torch_file
from lit_gpt.checkpoint.torch_file import MalformedState, one_line, require_dense
from lit_gpt.cli import BadInput
from lit_gpt.files import read_json, write_json

log = logging.getLogger(__name__)

_SAFETENSORS_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_DTYPES = {name: dtype for dtype, name in _SAFETENSORS_NAMES.items()}
_ENTRIES = tuple(
    f"{whole}{index}" for whole in ("model.safetensors", "pytorch_model.bin") for index in ("", ".index.json")
)
"""What a folder's weights are read from, as transformers ranks it."""
_HEADER_ALIGNMENT_BYTES = 8
"""safetensors pads its header with spaces to a multiple of this, so that mapped data is aligned."""
_MAX_HEADER_BYTES = 16 << 20
"""A thousand weights take some 100 kB; the library itself allows 100 MB."""


# Writing


class _Place(NamedTuple):
    """Where a weight is written."""

    file: str
    start: int
    """Offset in the file, in bytes."""
    shape: tuple[int, ...]


def split_into_files(shapes: Mapping[str, tuple[int, ...]], item_bytes: int, max_shard_bytes: int) -> list[list[str]]:
    """The names of the weights in each file, in order: as many as fit into max_shard_bytes, and at least one."""
    shards: list[list[str]] = [[]]
    used = 0
    for name, shape in shapes.items():
        size = torch.Size(shape).numel() * item_bytes
        if shards[-1] and used + size > max_shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards


def write_weights(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    tensors: Iterable[tuple[str, Tensor]],
    max_shard_bytes: int,
) -> dict[str, str]:
    """Write `tensors` (name, tensor), which must be exactly those of `shapes`, in any order; returns xxh3 by name.

    Raises BadInput if the disk lacks the room, or if a weight is not finite.
    """
    shards = split_into_files(shapes, dtype.itemsize, max_shard_bytes)
    total = sum(torch.Size(shape).numel() for shape in shapes.values()) * dtype.itemsize
    if (free := shutil.disk_usage(folder).free) < total:
        raise BadInput(f"no space for the weights: {total / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free at {folder}")
    names = [_shard_name(number, len(shards)) for number in range(1, len(shards) + 1)]
    files = {name: open(folder / name, "wb") for name in names}  # noqa: SIM115  (closed below)
    try:
        places: dict[str, _Place] = {}
        for file, shard in zip(names, shards, strict=True):
            places |= _write_header(files[file], file, {name: shapes[name] for name in shard}, dtype)
        hashes = {name: _write_tensor(files, places.pop(name), name, tensor, dtype) for name, tensor in tensors}
        assert not places, f"not written: {sorted(places)}"
    finally:
        for opened in files.values():
            opened.close()
    if len(shards) > 1:
        weight_map = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)
    return hashes


def _shard_name(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def _write_header(
    opened: BinaryIO, file: str, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype
) -> dict[str, _Place]:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": _SAFETENSORS_NAMES[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _HEADER_ALIGNMENT_BYTES)
    opened.write(len(text).to_bytes(8, "little") + text)
    return {
        name: _Place(file, 8 + len(text) + header[name]["data_offsets"][0], shape) for name, shape in shapes.items()
    }


def _write_tensor(files: Mapping[str, BinaryIO], place: _Place, name: str, tensor: Tensor, dtype: torch.dtype) -> str:
    assert (tensor.dtype, tuple(tensor.shape)) == (dtype, place.shape), name
    if not tensor.isfinite().all():
        cause = "a value above 65,504, the largest of fp16 (use bf16)" if dtype == torch.float16 else "NaN or infinity"
        raise BadInput(f"weight {name!r} holds {cause}: not written")
    data = _bytes(tensor)
    opened = files[place.file]
    opened.seek(place.start)
    opened.write(data)
    return xxhash.xxh3_64_hexdigest(data)


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().contiguous().view(torch.uint8).numpy().data


def require_hashes(folder: Path, hashes: Mapping[str, str]) -> None:
    """Read every weight of `folder` back; BadInput unless its bits are those that write_weights was given."""
    found = HFWeights(folder)
    assert found.names == set(hashes), sorted(found.names ^ set(hashes))
    for name, expected in hashes.items():
        if xxhash.xxh3_64_hexdigest(_bytes(found.read(name))) != expected:
            raise BadInput(
                f"weight {name!r} reads back from {folder} otherwise than it was written: the disk is faulty"
            )


# Reading


class HFWeights:
    """The weights of a folder by name. Files are mapped, so only what is read takes memory.

    The exception is a .bin that torch wrote before version 1.6: it is not a zip file and is loaded whole. Raises
    BadInput if a file is missing or damaged, or holds more than weights.
    """

    def __init__(self, folder: Path) -> None:
        self._files: dict[str, Any] = {}
        claimed: set[str] = set()
        for path in self._find(folder, claimed):
            names, opened = _open_weights(path)
            if twice := sorted(self._files.keys() & set(names)):
                raise BadInput(f"weight {twice[0]!r} is in two files of {folder}: which one counts is not said")
            self._files |= dict.fromkeys(names, opened)
        if absent := sorted(claimed - set(self._files)):
            raise BadInput(f"weight {absent[0]!r} is in the index of {folder}, but in no file")

    @property
    def names(self) -> set[str]:
        return set(self._files)

    def read(self, name: str) -> Tensor:
        """One weight, in the type in which it is stored; BadInput if it is not finite."""
        self._dtype(name)
        file = self._files[name]
        tensor = file[name] if isinstance(file, dict) else file.get_tensor(name)
        if not tensor.isfinite().all():
            raise BadInput(f"weight {name!r} holds NaN or infinity")
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a weight, without reading it."""
        file = self._files[name]
        return tuple(file[name].shape if isinstance(file, dict) else file.get_slice(name).get_shape())

    @property
    def dtype(self) -> torch.dtype:
        """The type in which all weights are stored; fp32 if they have several."""
        found = {self._dtype(name) for name in self._files}
        return found.pop() if len(found) == 1 else torch.float32

    def _dtype(self, name: str) -> torch.dtype:
        file = self._files[name]
        stored = file[name].dtype if isinstance(file, dict) else file.get_slice(name).get_dtype()
        found = _DTYPES.get(stored, stored)
        if found not in _SAFETENSORS_NAMES:
            raise BadInput(f"weight {name!r} is stored as {stored}; fp32, fp16 and bf16 are read")
        return found

    @staticmethod
    def _find(folder: Path, claimed: set[str]) -> list[Path]:
        """The files that transformers reads: safetensors before .bin, a single file before an index."""
        present = [name for name in _ENTRIES if (folder / name).is_file()]
        if len(present) > 1:
            log.warning("%s: %s is read, as by transformers; left aside: %s", folder, present[0], present[1:])
        if present and not present[0].endswith(".json"):
            return [folder / present[0]]
        if present:
            weight_map = read_json(folder / present[0]).get("weight_map")
            if not isinstance(weight_map, dict) or not all(_is_plain_name(file) for file in weight_map.values()):
                raise BadInput(f"{folder / present[0]}: weight_map must give each weight the name of a file beside it")
            claimed |= set(weight_map)
            return [folder / file for file in sorted(set(weight_map.values()))]
        raise BadInput(f"{folder} holds no weights: looked for model.safetensors and pytorch_model.bin, or their index")


def _is_plain_name(file: Any) -> bool:
    return isinstance(file, str) and file == Path(file).name


def _open_weights(path: Path) -> tuple[list[str], Any]:
    """The names in a file, and the opened file."""
    if path.suffix == ".safetensors":
        try:
            _require_header(path)
            opened = safe_open(path, framework="pt")
            return list(opened.keys()), opened
        except Exception as error:  # noqa: BLE001 - a damaged file may raise any class
            raise damaged(path, error) from None
    tensors = load_plain(path)
    if not isinstance(tensors, dict):
        raise damaged(path, TypeError(f"it holds a {type(tensors).__name__}, not a dictionary of weights"))
    try:
        for name, tensor in tensors.items():
            require_dense(tensor, str(name)[:80], path.stat().st_size)
            if not isinstance(name, str):
                raise MalformedState(f"{name!r} is no name of a weight")
    except MalformedState as error:
        raise damaged(path, error) from None
    return list(tensors), tensors


def _require_header(path: Path) -> None:
    """Raise MalformedState if this is no regular file, or if its header is larger than any model's."""
    if not path.is_file():  # a pipe would be waited for
        raise MalformedState("not a regular file")
    with path.open("rb") as file:
        first = file.read(8)
    if first == b"version ":
        raise MalformedState("it is a pointer of Git LFS, not the weights; `git lfs pull` fetches them")
    size = int.from_bytes(first, "little")
    if size > _MAX_HEADER_BYTES:
        raise MalformedState(f"a header of {size} bytes")


def load_plain(path: Path) -> Any:
    """What torch.save wrote, mapped; no code is run. BadInput if it is damaged or holds more than values.

    Cost: the file is read once for its CRC-32, as it has no other checksum.
    """
    try:
        return torch_file.load(path, check_crc=True)
    except MalformedState as error:
        raise damaged(path, error) from None
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror}") from None


def damaged(path: Path, error: Exception) -> BadInput:
    reason = one_line(error).removeprefix(f"{path}: ")
    return BadInput(f"{path} is damaged, or holds more than weights: {reason}")
