"""The weights of a Hugging Face model folder: written as a stream, read one by one.

A safetensors file is an 8-byte header length, a JSON header, then the bytes of all tensors. All shapes are known before
the first weight arrives, so the headers are written first and each weight goes straight to its offset. Weights are read
from safetensors files, or from the older .bin through torch's weights_only loader; nothing in a folder is executed.
Cost: memory for one weight.
"""

from __future__ import annotations

import json
import pickle
import shutil
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lit_gpt.cli import BadInput
from lit_gpt.files import read_json, write_json

_SAFETENSORS_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_HEADER_ALIGNMENT_BYTES = 8
"""safetensors pads its header with spaces to a multiple of this, so that mapped data is aligned."""


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
            self._files |= dict.fromkeys(names, opened)
        if absent := sorted(claimed - set(self._files)):
            raise BadInput(f"weight {absent[0]!r} is in the index of {folder}, but in no file")

    @property
    def names(self) -> set[str]:
        return set(self._files)

    def read(self, name: str) -> Tensor:
        """One weight, in the type in which it is stored; BadInput if it is not finite."""
        file = self._files[name]
        tensor = file[name] if isinstance(file, dict) else file.get_tensor(name)
        if not tensor.isfinite().all():
            raise BadInput(f"weight {name!r} holds NaN or infinity")
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a weight, without reading it."""
        file = self._files[name]
        return tuple(file[name].shape if isinstance(file, dict) else file.get_slice(name).get_shape())

    @staticmethod
    def _find(folder: Path, claimed: set[str]) -> list[Path]:
        for whole in ("model.safetensors", "pytorch_model.bin"):
            index = folder / f"{whole}.index.json"
            if index.is_file():
                weight_map = read_json(index).get("weight_map", {})
                claimed |= set(weight_map)
                return [folder / Path(file).name for file in sorted(set(weight_map.values()))]
            if (folder / whole).is_file():
                return [folder / whole]
        raise BadInput(f"{folder} holds no weights: looked for model.safetensors and pytorch_model.bin, or their index")


def _open_weights(path: Path) -> tuple[list[str], Any]:
    """The names in a file, and the opened file."""
    try:
        if path.suffix == ".safetensors":
            opened = safe_open(path, framework="pt")
            return list(opened.keys()), opened
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        return list(tensors), tensors
    except (OSError, SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).split("\n", 1)[0]
        raise BadInput(f"{path} is damaged, or holds more than weights: {reason}") from None
