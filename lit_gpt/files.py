"""Files that survive a kill: how to publish, remove and hash them.

Publish: write under a temporary name in the same folder, fsync, rename, fsync the folder. Even after a crash of the
machine, a file or folder is either whole or absent (or as it was before). The temporary name tells its writer
(locks.py), so no two processes write the same one; `sweep` removes those that killed writers left. It is created
exclusively, so a link that was planted under it is removed. What is written in place goes through `open_own`.

Costs: publishing a file takes two fsyncs, some ms; hashing reads 5 to 10 GB/s from the page cache.
"""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shutil
import stat
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash

from lit_gpt.cli import NO_ROOM, BadInput
from lit_gpt.locks import Lock, LockHeld, is_left_behind, temporary_path

STALE_TEMPORARY_S = 86_400.0
MAX_JSON_BYTES = 16 << 20
"""Of JSON from elsewhere: parsed, it takes up to some thirty times its size, and what describes a model has 1 MB."""
OWN_JSON_BYTES = 256 << 20
"""Of what our programs write, which grows with a run's starts and a data set's files: two million of them."""
_HASH_CHUNK_BYTES = 1 << 20
_CUT_ARRAY = re.compile(r"\d+ requested and \d+ written")
"""What numpy says, without an errno, of an array for which there was no room."""
_TEMPORARY = re.compile(r"\.?(?P<name>.+?)(\.(?P<host>[^.]+)-(?P<pid>\d+))?\.partial")
"""Our temporary names; earlier versions left out host and pid."""


# Publishing


def publish(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Write the file `path`, or replace it. Raises as publishing does."""
    size = sum(memoryview(part).nbytes for part in parts) if isinstance(parts, Sequence) else None
    with publishing(path, size=size) as partial, open(partial, "wb") as file:
        for part in parts:
            file.write(part)


@contextmanager
def publishing(path: Path, *, folder: bool = False, size: int | None = None) -> Iterator[Path]:
    """Yield a new, empty file (or folder) under a temporary name: renamed to `path` at the end, removed at any failure.

    An existing file is replaced. size: bytes that it will have, if known. Where no room is left (NO_ROOM), the OSError
    names `path` and tells how far it came.
    """
    partial = temporary_path(path)
    _create(partial, folder=folder)
    try:
        yield partial
        fsync(partial)
        rename(partial, path)
    except BaseException as error:  # Ctrl-C too
        written = _size(partial)
        discard(partial)
        number = errno.ENOSPC if _CUT_ARRAY.fullmatch(str(error)) else getattr(error, "errno", None)
        if isinstance(error, OSError) and number in NO_ROOM:
            said = f"{written:,} bytes" if size is None else f"{written:,} of {size:,} bytes"
            raise OSError(number, f"{os.strerror(number)}; {said} were written", str(path)) from error
        raise


@contextmanager
def publishing_new(destination: Path, *, folder: bool) -> Iterator[Path]:
    """`publishing` for a file, or with `folder` an empty folder, that must not exist yet.

    Missing parents are made, and removed again at a failure. A lock keeps other writers out, so what killed ones left
    behind is swept. Raises BadInput if `destination` exists, is being written by another process, or cannot be written.
    """
    if os.path.lexists(destination):
        raise BadInput(f"{destination} exists already: name another destination, or remove it first")
    made_parents = [parent for parent in destination.parents if not parent.exists()]
    try:
        with _lock_of_new(destination):
            sweep(destination.parent, destination.name, alone=True)
            with publishing(destination, folder=folder) as partial:
                yield partial
                if os.path.lexists(destination):
                    raise BadInput(f"{destination} appeared meanwhile: nothing was published")
    except BaseException:
        for parent in made_parents:
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()
        raise


def _lock_of_new(destination: Path) -> Lock:
    try:
        if not destination.parent.exists():
            destination.parent.mkdir(parents=True, exist_ok=True)
        return Lock(destination.with_name(f".{destination.name}.lock"), remove=True)
    except LockHeld:
        raise BadInput(f"{destination} is being written by another process") from None
    except OSError as error:
        raise BadInput(f"cannot write {destination}: {error.strerror}") from None


def _size(path: Path) -> int:
    """Bytes of a file, or of all files in a folder; 0 if it is gone."""
    inside = [Path(folder, name) for folder, _, names in os.walk(path) for name in names]
    return sum(part.lstat().st_size for part in inside or [path] if part.is_file())


def fsync(path: Path) -> None:
    """Sync a file, or a folder with all that it holds, to disk."""
    for folder, _, names in os.walk(path, topdown=False):
        for name in names:
            _fsync_one(Path(folder, name))
        _fsync_one(Path(folder))
    if not path.is_dir():
        _fsync_one(path)


def rename(partial: Path, path: Path) -> None:
    """Rename a file or folder that is synced already; on return the new name is on disk too."""
    os.replace(partial, path)
    _fsync_one(path.parent)


def _fsync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(descriptor)


def sweep(folder: Path, name: str | None = None, *, alone: bool = False) -> None:
    """Remove what killed writers left in `folder`: every temporary name, or those for the file `name`.

    alone: the caller holds a lock, so nobody else writes there. Otherwise a temporary name goes only if its process has
    ended on this host, or if nothing was written to it for STALE_TEMPORARY_S.
    """
    for path in folder.glob("*.partial"):
        found = _TEMPORARY.fullmatch(path.name)
        if found is None or (name is not None and found["name"] != name):
            continue
        if alone or is_left_behind(path, found["host"], found["pid"], STALE_TEMPORARY_S):
            discard(path)


def discard(path: Path) -> None:
    """Remove a file, a folder with all that it holds, or a link, but not what the link leads to; or nothing.

    NFS keeps a file that is open somewhere under a name .nfs..., until it is closed: such a folder remains.
    """
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    elif sys.version_info >= (3, 12):
        shutil.rmtree(path, onexc=lambda _, name, error: _raise_unless_open(name, error))
    else:
        shutil.rmtree(path, onerror=lambda _, name, error: _raise_unless_open(name, error[1]))


def _raise_unless_open(name: str, error: BaseException) -> None:
    """Raise what removing `name` met, unless it is gone, or is an open file of NFS or a folder of nothing else."""
    if isinstance(error, FileNotFoundError):
        return
    left = [name] if not os.path.isdir(name) else [inner for *_, names in os.walk(name) for inner in names]
    if not left or not all(os.path.basename(inner).startswith(".nfs") for inner in left):
        raise error


def _create(partial: Path, *, folder: bool = False) -> None:
    """Make an empty file or folder; what has its name, left by a killed process or planted, goes first."""
    discard(partial)
    partial.mkdir() if folder else partial.touch(exist_ok=False)  # O_EXCL: neither follows a link


def open_own(path: Path, flags: int) -> int:
    """os.open for a file of ours that is written in place, under a name that anybody can know.

    Never through a symbolic link that was planted there, whose target would be emptied or grow; never waits for the
    reader of a pipe. Raises OSError for both.
    """
    try:
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(error.errno, "it is a symbolic link", str(path)) from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return descriptor


def rewrite(path: Path, content: bytes) -> None:
    """Make the file `path` hold `content`, in place and without syncing it. Raises as open_own does."""
    with os.fdopen(open_own(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), "wb") as file:
        file.write(content)


def save_figure(figure: Any, path: Path, dpi: int) -> None:
    """Write a figure of matplotlib in the form that the ending of `path` names. Raises as open_own and savefig do."""
    content = io.BytesIO()
    figure.savefig(content, dpi=dpi, format=path.suffix[1:])
    rewrite(path, content.getvalue())


# Hashing and reading


def xxh3(path: Path) -> str:
    """xxh3 of a file's bytes (64 bits), as 16 hexadecimal digits."""
    digest, chunk = xxhash.xxh3_64(), memoryview(bytearray(_HASH_CHUNK_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(chunk):
            digest.update(chunk[:count])
    return digest.hexdigest()


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Publish `value` as indented JSON."""
    publish(path, [(json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()])


def read_text(path: Path, largest: int = MAX_JSON_BYTES) -> str:
    """The text of `path`; BadInput if it cannot be read, is no UTF-8, or has more than `largest` bytes."""
    try:
        if not path.is_file() and path.exists():  # a pipe would be waited for
            raise BadInput(f"{path} is no regular file")
        if (size := path.stat().st_size) > largest:
            raise BadInput(f"{path} has {size:,} bytes; at most {largest:,} are read")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is no text in UTF-8: {error}") from None


def read_json(path: Path, largest: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The JSON object in `path`; BadInput if it holds none, or as read_text raises it."""
    text = read_text(path, largest)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise BadInput(f"{path} holds no JSON object")
    return value
