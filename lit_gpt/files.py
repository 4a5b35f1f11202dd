"""Files that survive a kill: how to publish, lock and hash them.

Publish: write under a temporary name in the same folder, fsync, rename, fsync the folder. Even after a crash of the
machine, a file or folder is either whole or absent (or as it was before). The temporary name is
`.NAME.HOST-PID.partial`, so no two processes write the same one; `sweep` removes those that killed writers left. It
is created exclusively, so a link that was planted under it, or under a lock's name, is removed or refused.

Lock: flock, which the kernel releases when its holder ends, however it ends. A forked child that does not exec would
keep it; the project has none. On a file system without locks (Lustre without -o flock, some NFS) an owner file replaces
the lock, with a warning. It is created with O_EXCL, holds host and pid, and its owner touches it every BEAT_S. Another
process takes it over if the owner has ended on this host, or if nobody has touched the file for STALE_S.

Costs: publishing a file takes two fsyncs, some ms; hashing reads 5 to 10 GB/s from the page cache.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import re
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash

from lit_gpt.cli import BadInput

log = logging.getLogger(__name__)

BEAT_S = 5.0
STALE_S = 60.0
"""After a crash, a start on another host within this time is refused. Slurm waits two minutes before it requeues."""
STALE_TEMPORARY_S = 86_400.0
_POLL_S = 0.5
_HASH_CHUNK_BYTES = 16 << 20
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
_TEMPORARY = re.compile(r"\.?(?P<name>.+?)(\.(?P<host>[^.]+)-(?P<pid>\d+))?\.partial")
"""Our temporary names; earlier versions left out host and pid."""


# Publishing


def publish(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Write the file `path`, or replace it."""
    with publishing(path) as partial, open(partial, "wb") as file:
        for part in parts:
            file.write(part)


@contextmanager
def publishing(path: Path, *, folder: bool = False) -> Iterator[Path]:
    """Yield a new, empty file (or folder) under a temporary name: renamed to `path` at the end, removed at any failure.

    An existing file is replaced.
    """
    partial = _temporary_path(path)
    _create(partial, folder=folder)
    try:
        yield partial
        fsync(partial)
        rename(partial, path)
    except BaseException:  # Ctrl-C too
        discard(partial)
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
        if alone or _is_left_behind(path, found["host"], found["pid"], STALE_TEMPORARY_S):
            discard(path)


def _temporary_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.{_host()}-{os.getpid()}.partial")


def _host() -> str:
    return socket.gethostname().partition(".")[0]


def discard(path: Path) -> None:
    """Remove a file, a folder with all that it holds, or a link, but not what the link leads to; or nothing."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path)


def _create(partial: Path, *, folder: bool = False) -> None:
    """Make an empty file or folder; what has its name, left by a killed process or planted, goes first."""
    discard(partial)
    partial.mkdir() if folder else partial.touch(exist_ok=False)  # O_EXCL: neither follows a link


def _is_left_behind(path: Path, host: str | None, pid: str | None, stale_s: float) -> bool:
    """Whether the process that writes or touches `path` has ended, as far as this host can tell."""
    if host == _host() and pid is not None and not _is_alive(int(pid)):
        return True
    now = _temporary_path(path.with_name("now"))  # by the file system's clock: two hosts' may differ
    try:
        _create(now)
        return now.stat().st_mtime - path.stat().st_mtime > stale_s
    except FileNotFoundError:  # just removed
        return False
    finally:
        now.unlink(missing_ok=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError as error:
        return error.errno != errno.ESRCH  # EPERM: another user's
    return True


# Locking


class LockHeld(Exception):
    """Another process holds the lock."""


class Lock:
    """The lock of the file `path`, which is created if missing. Held until `close`, or until this process ends.

    wait: wait until the lock is free, instead of raising LockHeld. remove: delete the file when the lock is released.
    """

    def __init__(self, path: Path, *, wait: bool = False, remove: bool = False) -> None:
        self._path, self._remove = path, remove
        self._descriptor: int | None = None
        self._owner: _OwnerFile | None = None
        try:
            self._descriptor = _locked(path, wait)
        except BlockingIOError:
            raise LockHeld(f"another process holds {path}") from None
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise BadInput(f"{path} is a symbolic link: remove it, so that a file can be there") from None
            if error.errno not in _NO_LOCKS:
                raise
            owner = path.with_name(f"{path.name}.owner")
            log.warning("%s cannot be locked (%s): the file %s replaces the lock", path, error.strerror, owner.name)
            self._owner = _OwnerFile(owner, wait)

    def close(self) -> None:
        """Release the lock."""
        if self._remove:
            self._path.unlink(missing_ok=True)
        if self._descriptor is not None:
            os.close(self._descriptor)
        if self._owner is not None:
            self._owner.close()
        self._descriptor = self._owner = None

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _locked(path: Path, wait: bool) -> int:
    """A descriptor of `path` that holds its lock; raises BlockingIOError if another process holds it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # the last holder removed this file: others would lock a new one


class _OwnerFile:
    """Replaces the lock where the file system has none."""

    def __init__(self, path: Path, wait: bool) -> None:
        self._path = path
        self._name = f"{_host()} {os.getpid()} {secrets.token_hex(4)}"
        while not self._is_made():
            if not self._is_taken_from_dead():
                if not wait:
                    raise LockHeld(f"another process holds {path}")
                time.sleep(_POLL_S)
        self._closed = threading.Event()
        threading.Thread(target=self._beat, name="lock", daemon=True).start()

    def _is_made(self) -> bool:
        try:
            with open(self._path, "x") as file:
                file.write(self._name)
        except FileExistsError:
            return False
        return True

    def _is_taken_from_dead(self) -> bool:
        """Remove the file if its owner is dead; whether it is gone."""
        aside = _temporary_path(self._path)
        try:
            owner = self._path.read_text()
            host, pid, _ = owner.split() if owner else (None, None, None)  # empty: just created
            if not _is_left_behind(self._path, host, pid, STALE_S) or self._path.read_text() != owner:
                return False
            os.rename(self._path, aside)
        except FileNotFoundError:
            return True
        if aside.read_text() != owner:  # another process was quicker: this file is its own
            os.rename(aside, self._path)
            return False
        aside.unlink()
        log.warning("%s was left behind by process %s of %s: taken over", self._path, pid, host)
        return True

    def _beat(self) -> None:
        while not self._closed.wait(BEAT_S):
            try:
                if self._path.read_text() == self._name:
                    os.utime(self._path)
                    continue
            except OSError as error:
                if error.errno != errno.ENOENT:
                    log.warning("%s cannot be touched: %s", self._path, error.strerror)
                    continue
            if not self._closed.is_set():
                log.error("%s is no longer ours: another process may write here too", self._path)
            return

    def close(self) -> None:
        self._closed.set()
        if self._path.exists() and self._path.read_text() == self._name:
            self._path.unlink()


# Hashing and reading


def xxh3(path: Path) -> str:
    """xxh3 of a file's bytes (64 bits), as 16 hexadecimal digits."""
    digest = xxhash.xxh3_64()
    with path.open("rb") as file:
        while chunk := file.read(_HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Publish `value` as indented JSON."""
    publish(path, [(json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()])


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; BadInput if it cannot be read or holds none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise BadInput(f"{path} holds no JSON object")
    return value
