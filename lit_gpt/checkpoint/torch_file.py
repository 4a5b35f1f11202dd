"""What torch.save wrote, read as data: no code is run, and memory and time are bounded by the file's size.

torch's weights_only loader runs no code. But it builds what a few hundred bytes ask for: a bytearray or a sparse tensor
of any size, a tuple nested so deeply that hashing it overflows the C stack, parts that a zip file compressed a
thousandfold. So before anything is built, the pickle is scanned: its names must be those of plain tensors and values,
its nesting and its memo's indexes bounded; and the parts of the zip file must be stored, no larger than the file, and
where its directory says, for torch maps a tensor without a look at what it finds there.
Anything else raises MalformedState.
Cost: some microseconds for each operation of the pickle and each part; the tensors are not read.
"""

from __future__ import annotations

import io
import logging
import os
import pickletools
import re
import struct
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)

_NAMES = re.compile(
    r"collections OrderedDict|torch\._utils _rebuild_(tensor_v2|parameter)|torch\.nn\.parameter Parameter"
    r"|torch (Size|device)|torch(\.cuda)? [A-Z][A-Za-z0-9]*Storage|torch\.storage (Untyped|Typed)Storage"
    r"|torch (bool|complex\d+|u?int\d+|b?float\d+\w*)"
)
"""What the pickle of plain tensors, numbers, texts, lists and dictionaries names."""
_LOCAL_HEADER = struct.Struct("<4s22xHH")
"""Of a part: signature, length of the name, length of the extra field (.ZIP File Format Specification, 4.3.7)."""
_AFTER_A_PART = (b"PK\x07\x08", b"PK\x03\x04", b"PK\x01\x02")
"""Its data descriptor, the next part, or the directory."""
_MAX_DEPTH = 500
_FILLS = ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD")
"""What adds to the lowest of its operands."""
_MAX_PICKLE_BYTES = 16 << 20
"""A state of some thousand tensors takes less than 1 MB."""


class MalformedState(ValueError):
    """The files do not hold the expected state; says what is wrong with them, in one line."""


def load(path: Path, *, mmap: bool = True, check_crc: bool = False) -> Any:
    """The values and tensors (on the CPU) in the file; raises MalformedState, or OSError if it cannot be read.

    mmap: map the tensors; a file of torch before version 1.6 is read whole all the same. check_crc: compare all parts
    with their CRC-32, for a file that has no other checksum.
    """
    try:
        if not path.is_file():  # a pipe would be waited for
            raise MalformedState("not a regular file")
        with path.open("rb") as file:
            zipped = require_plain(file, check_crc=check_crc)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and zipped)
    except OSError:
        raise
    except Exception as error:  # noqa: BLE001 - a damaged file may raise any class
        raise MalformedState(f"{path}: {one_line(error)}") from None


def require_plain(file: IO[bytes], *, check_crc: bool = False) -> bool:
    """Whether the file is a zip file, as torch writes today; raises MalformedState, or what its damage raises."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    zipped = zipfile.is_zipfile(file)
    if zipped:
        with zipfile.ZipFile(file) as archive:
            _require_stored(archive, size, check_crc)
            _require_in_place(archive.infolist(), file)
            pickles = [entry for entry in archive.infolist() if entry.filename.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise MalformedState(f"{len(pickles)} parts data.pkl, not one")
            require_bounded(archive.read(pickles[0]))
    else:  # torch before version 1.6: magic number, version, facts about the machine, state, names of storages
        file.seek(0)
        for count in range(5):
            _scan(file, largest=size if count >= 3 else None)
    file.seek(0)
    return zipped


def _require_stored(archive: zipfile.ZipFile, size: int, check_crc: bool) -> None:
    entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise MalformedState("its parts are compressed, which torch.save does not do")
    if sum(entry.file_size for entry in entries) > size:
        raise MalformedState("its parts exceed the file")
    if not any(entry.CRC for entry in entries):  # torch.serialization.set_crc32_options(False)
        for entry in entries:
            entry.CRC = None  # type: ignore[assignment]  # so it is not compared
        if check_crc:
            log.warning("%s was written without checksums: damage to its weights cannot be seen", archive.filename)
    elif check_crc and (damaged := archive.testzip()) is not None:
        raise MalformedState(f"{damaged} does not match its CRC-32")


def _require_in_place(entries: Sequence[zipfile.ZipInfo], file: IO[bytes]) -> None:
    """Raise MalformedState unless each part begins and ends where the directory says, and has a name of its own."""
    names = {entry.filename.lower() for entry in entries}  # torch finds a part by its name in any case
    if len(names) < len(entries):
        raise MalformedState("two of its parts have one name")
    for entry in entries:
        file.seek(entry.header_offset)
        signature, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
        name = file.read(name_bytes)
        file.seek(extra_bytes + entry.file_size, os.SEEK_CUR)
        if (
            signature != zipfile.stringFileHeader  # type: ignore[attr-defined]
            or name != entry.orig_filename.encode("utf-8" if entry.flag_bits & 0x800 else "cp437")
            or file.read(4) not in _AFTER_A_PART
        ):
            raise MalformedState(f"{entry.filename} is not where the zip file's directory says")


def require_bounded(content: bytes) -> None:
    """Raise MalformedState unless this is a pickle of plain tensors and values."""
    if len(content) > _MAX_PICKLE_BYTES:
        raise MalformedState(f"a pickle of {len(content)} bytes")
    _scan(io.BytesIO(content))


def _scan(file: IO[bytes], largest: int | None = None) -> None:
    """Scan the next pickle; largest: no whole number in it may be larger, as where a size is allocated unseen."""
    for opcode, argument in scanned(file):
        if opcode in ("STACK_GLOBAL", "INST") or (opcode == "GLOBAL" and not _NAMES.fullmatch(argument)):
            raise MalformedState(f"it names {argument}, which a weights-only file does not hold")
        if opcode.startswith(("BININT", "LONG")) and largest is not None and argument > largest:
            raise MalformedState(f"a size of {argument} exceeds the file")


def scanned(file: IO[bytes]) -> Iterator[tuple[str, Any]]:
    """The operations (name, argument) of the next pickle in the file, none of them done.

    Raises MalformedState if something is nested deeper than _MAX_DEPTH, or where a memo's index is larger than the
    number of its entries, by which C's unpickler allocates; ValueError if this is no pickle.
    """
    stack: list[int | None] = []  # depths; None is a mark
    memo: dict[int, int] = {}
    opcode: pickletools.OpcodeInfo
    argument: Any
    for opcode, argument, _ in pickletools.genops(file):
        name = opcode.name
        yield name, argument
        if name == "MEMOIZE":
            memo[len(memo)] = _top(stack)
        elif name.endswith("PUT"):
            if int(argument) > len(memo):
                raise MalformedState(f"index {argument} of a memo of {len(memo)}")
            memo[int(argument)] = _top(stack)
        elif name.endswith("GET"):
            stack.append(memo.get(int(argument), 0))
        elif name == "MARK":
            stack.append(None)
        elif opcode.stack_before or opcode.stack_after:
            _apply(opcode, stack)


def _apply(opcode: pickletools.OpcodeInfo, stack: list[int | None]) -> None:
    """Replace what the operation takes from the stack by what it gives, which is deeper by one."""
    taken: list[int] = []
    wanted = [thing.name for thing in opcode.stack_before]
    if "mark" in wanted:
        while stack and (depth := stack.pop()) is not None:
            taken.append(depth)
        wanted = wanted[: wanted.index("mark")]
    for _ in wanted:
        taken.append(_top(stack))
        stack.pop()
    if opcode.name in _FILLS and taken:
        depth = max(taken[-1], 1 + max(taken[:-1], default=0))
    else:
        depth = 1 + max(taken, default=0)
    if depth > _MAX_DEPTH:
        raise MalformedState(f"nested deeper than {_MAX_DEPTH}")
    stack.extend([depth] * len(opcode.stack_after))


def _top(stack: list[int | None]) -> int:
    if not stack or stack[-1] is None:
        raise MalformedState("an operation without its operands")
    return stack[-1]


def require_dense(tensor: Any, name: str, file_bytes: int) -> None:
    """Raise MalformedState unless this is a plain tensor on the CPU, no larger than the file that it came from."""
    if not isinstance(tensor, Tensor):
        raise MalformedState(f"{name!r} is a {type(tensor).__name__}, not a weight")
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        raise MalformedState(f"{name!r} is not a plain tensor")
    if tensor.numel() * tensor.itemsize > file_bytes:
        raise MalformedState(f"{name!r} of shape {tuple(tensor.shape)} exceeds the file")


def one_line(error: BaseException) -> str:
    """The error's message in one line, or its class where there is no message."""
    return " ".join(str(error).split())[:200] or type(error).__name__
