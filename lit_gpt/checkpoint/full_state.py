"""state.pth of a full checkpoint: the whole state, written by one process; each process reads the part it holds.

Reading runs no code (weights_only). A file that does not hold the expected state raises MalformedState.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from lit_gpt.checkpoint import torch_file
from lit_gpt.checkpoint.sharded_state import plain_os_errors
from lit_gpt.checkpoint.torch_file import MalformedState, require_dense


def write(state: dict[str, Any], path: Path) -> None:
    """Write the state; raises OSError if the disk fails."""
    with plain_os_errors(), path.open("wb") as file:
        torch.save(state, file)


def has_optimizer(path: Path) -> bool:
    """Whether the file holds an optimizer's state; an imported model's does not."""
    with FakeTensorMode():
        return "optimizer" in _load(path, mmap=False)


@torch.no_grad()
def read_into(state: dict[str, Any], path: Path) -> None:
    """Fill the tensors of `state` in place (of sharded ones, this rank's part), and replace its other values.

    Raises MalformedState, before anything is filled, unless the file has the same names and shapes. Cost: the file is
    mapped, so that a rank reads only its part.
    """
    found = _load(path, mmap=True)
    if differences := list(_differences(state, found, ())):
        raise MalformedState(f"{path}: {'; '.join(differences[:3])}")
    _fill(state, found)


def weights(path: Path) -> Iterator[tuple[str, Tensor]]:
    """The model's weights (name, tensor), one after another, by plain reads.

    torch's own mmap is a private, writable mapping of the whole file, for which Linux reserves memory: it refuses a
    file that is larger than the machine's memory.
    """
    with FakeTensorMode():
        fakes = _load(path, mmap=False).get("model")
    if not isinstance(fakes, dict):
        raise MalformedState(f"{path}: 'model' is not a dictionary of tensors")
    file_bytes = path.stat().st_size
    with path.open("rb") as file:
        for name, fake in fakes.items():
            start = _start(fake, name, path, file_bytes)
            file.seek(start)
            # not the storage's size, which torch 2.10 multiplies by the element size
            last = fake.storage_offset() + sum(
                (n - 1) * stride for n, stride in zip(fake.shape, fake.stride(), strict=True)
            )
            if (needed := (last + 1) * fake.itemsize) > file_bytes - start:
                raise MalformedState(f"{path} ends within weight {name!r}")
            data = bytearray(needed)
            file.readinto(data)
            whole = torch.frombuffer(data, dtype=fake.dtype)
            yield name, whole.as_strided(fake.size(), fake.stride(), fake.storage_offset())


def _start(fake: Any, name: Any, path: Path, file_bytes: int) -> int:
    """The offset of a weight's storage in the file; MalformedState unless it is a plain tensor of numbers."""
    try:
        require_dense(fake, str(name), file_bytes)
    except MalformedState as error:
        raise MalformedState(f"{path}: {error}") from None
    if not isinstance(name, str) or not fake.dtype.is_floating_point:
        raise MalformedState(f"{path}: {name!r} is of {fake.dtype}, not a weight")
    start: int | None = fake.untyped_storage()._checkpoint_offset
    if start is None:
        raise MalformedState(f"{path}: no zip file, as torch before version 1.6 wrote it")
    return start


def _load(path: Path, *, mmap: bool) -> dict[str, Any]:
    found = torch_file.load(path, mmap=mmap)
    if not isinstance(found, dict):
        raise MalformedState(f"{path}: a {type(found).__name__}, not a dictionary")
    return found


def _differences(wanted: Any, found: Any, names: tuple[str, ...]) -> Iterator[str]:
    """Where names and shapes of `found` and `wanted` differ; values that are not tensors may differ."""
    where = ".".join(names) or "the state"
    if isinstance(wanted, Tensor):
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        if shape != tuple(wanted.shape):
            yield f"{where} is {shape}, not {tuple(wanted.shape)}"
    elif names == ("optimizer", "param_groups"):
        if _members(found) != _members(wanted):
            yield f"{where} are not of this optimizer's parameters"
    elif isinstance(wanted, dict):
        if not isinstance(found, dict):
            yield f"{where} is a {type(found).__name__}, not a dictionary"
            return
        yield from (f"{where} lacks {name}" for name in wanted if name not in found)
        yield from (f"{where} has an unknown {name}" for name in found if name not in wanted)
        for name in wanted:
            if name in found:
                yield from _differences(wanted[name], found[name], (*names, name))


def _members(groups: Any) -> list[list[str]] | None:
    """The parameters of each group; a group's other settings depend on the version of torch."""
    try:
        return [sorted(group["params"]) for group in groups]
    except (TypeError, KeyError):
        return None


def _fill(state: dict[str, Any], found: dict[str, Any]) -> None:
    for name, value in state.items():
        if isinstance(value, dict):
            _fill(value, found[name])
        elif isinstance(value, DTensor):
            shape, offset = compute_local_shape_and_global_offset(value.shape, value.device_mesh, value.placements)
            part = tuple(slice(start, start + length) for start, length in zip(offset, shape, strict=True))
            value.to_local().copy_(found[name][part])
        elif isinstance(value, Tensor):
            value.copy_(found[name])
        else:
            state[name] = found[name]
