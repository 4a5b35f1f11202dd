"""One writer at a time: locks, and temporary names that tell whose they are.

A lock is a flock, which the kernel releases when its holder ends, however it ends. (A forked child that does not exec
would keep it; the project has none.) On some clusters that is not enough, so beside the locked file lies one that says
whose it is, FILE.owner: host, pid and a random number. It is created with O_EXCL, and touched every BEAT_S.

- Locks of one node only (Lustre's localflock, NFS's local_lock, BeeGFS by default): an owner on another host that
  touches its file holds the lock, though the kernel gave it to us.
- No locks at all (Lustre without -o flock, some NFS): the owner file replaces the lock, with a warning. It is taken
  over if its owner has ended on this host, or if nobody has touched the file for STALE_S.

Invariants: no link is followed; one process of all hosts holds a lock. An owner that is stopped for longer than the
above may lose its file: it says so when it goes on. So whoever writes under a lock writes under a temporary name all
the same: `.NAME.HOST-PID.partial`.
Costs: a touch every BEAT_S; after a kill, a start on another host within STALE_S takes WATCH_S longer.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import secrets
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from lit_gpt.cli import NO_ROOM, BadInput

log = logging.getLogger(__name__)

BEAT_S = 5.0
WATCH_S = 3 * BEAT_S
STALE_S = 60.0
"""Without locks, a start on another host within this time after a crash is refused; Slurm requeues after two min."""
_POLL_S = 0.5
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


# Names of processes


def host_name() -> str:
    return socket.gethostname().partition(".")[0]


def temporary_path(path: Path) -> Path:
    """The name under which this process writes `path`."""
    return path.with_name(f".{path.name}.{host_name()}-{os.getpid()}.partial")


def is_left_behind(path: Path, host: str | None, pid: str | None, stale_s: float) -> bool:
    """Whether the process that writes or touches `path` has ended, as far as this host can tell."""
    if host == host_name() and pid is not None and not _is_alive(int(pid)):
        return True
    now = temporary_path(path.with_name("now"))  # by the file system's clock: two hosts' may differ
    try:
        now.unlink(missing_ok=True)
        now.touch(exist_ok=False)
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


# Locks


class LockHeld(Exception):
    """Another process holds the lock; the message says which file, and where it can, who."""


class Lock:
    """The lock of the file `path`, which is created if missing. Held until `close`, or until this process ends.

    wait: wait until the lock is free, instead of raising LockHeld. remove: delete the file when the lock is released.
    """

    def __init__(self, path: Path, *, wait: bool = False, remove: bool = False) -> None:
        self._path, self._remove = path, remove
        self._descriptor: int | None = None
        self._owner: _OwnerFile | None = None
        owner = path.with_name(f"{path.name}.owner")
        try:
            self._descriptor = _locked(path, wait)
        except BlockingIOError:
            raise LockHeld(f"another process holds {path}") from None
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise _is_link(path) from None
            if error.errno not in _NO_LOCKS:
                raise
            log.warning("%s cannot be locked (%s): the file %s replaces the lock", path, error.strerror, owner.name)
        try:
            self._owner = _OwnerFile(owner, wait, locked=self._descriptor is not None)
        except BaseException as error:  # a signal that ends the program too
            if self._descriptor is None:
                raise
            if not (isinstance(error, OSError) and error.errno in NO_ROOM):
                self._remove &= not isinstance(error, LockHeld)  # then it is another's
                self.close()
                raise
            log.warning("%s cannot be written (%s): only the lock keeps others out", owner, error.strerror)

    def close(self) -> None:
        """Release the lock. What keeps the others out goes last: the flock, or the owner file where there is none."""
        if self._owner is not None and self._descriptor is not None:
            self._owner.close()  # who locked a new file would take it for one that was left behind
        if self._remove:
            self._path.unlink(missing_ok=True)
        if self._owner is not None and self._descriptor is None:
            self._owner.close()
        if self._descriptor is not None:
            os.close(self._descriptor)
        self._descriptor = self._owner = None

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _is_link(path: Path) -> BadInput:
    return BadInput(f"{path} is a symbolic link: remove it, so that a file can be there")


def _locked(path: Path, wait: bool) -> int:
    """A descriptor of `path` that holds its lock; raises BlockingIOError if another process holds it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if _is_at(path, descriptor):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # the last holder removed this file: others would lock a new one


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


class _OwnerFile:
    """Says who holds the lock.

    locked: this process has the flock too, so an owner on this host has ended, and one elsewhere if it does not touch.
    """

    def __init__(self, path: Path, wait: bool, *, locked: bool) -> None:
        self._path, self._locked, self._told = path, locked, False
        self._claim = path.with_name(f".{path.name}.claim")
        self._name = f"{host_name()} {os.getpid()} {secrets.token_hex(4)}"
        self._closed = threading.Event()
        try:
            while not self._is_made():
                if not self._is_taken_from_dead():
                    if not wait:
                        raise LockHeld(f"another process holds {path.with_suffix('')}{_named(path)}")
                    time.sleep(_POLL_S)
            threading.Thread(target=self._touch, name="lock", daemon=True).start()
        except BaseException:  # a signal that ends the program too
            self.close()
            raise

    def _is_made(self) -> bool:
        if self._is_written(self._path):
            return True
        if self._path.is_symlink():
            raise _is_link(self._path)
        return False

    def _is_written(self, path: Path) -> bool:
        """Make the file, which says whose it is; False if it exists."""
        try:
            file = open(path, "xb", buffering=0)  # noqa: SIM115 - closed below
        except FileExistsError:
            return False
        try:
            with file:
                file.write(self._name.encode())
        except OSError:  # no room: a file of nobody would keep the next start waiting
            path.unlink(missing_ok=True)
            raise
        return True

    def _is_taken_from_dead(self) -> bool:
        """Remove the file if its owner is dead; whether it is gone.

        One process at a time does that: the one with the flock, or, where the owner is on another host or there are no
        locks, the one that has made the claim. So what it has found dead is what it removes.
        """
        try:
            seen = _look(self._path)
            if not self._is_dead(seen):
                return False
            if self._locked and seen.host == host_name():
                self._path.unlink()
                return True
            if not self._is_claimed():
                return False
        except FileNotFoundError:
            return True
        try:
            if _look(self._path) != seen:  # another process was quicker: this file is its own
                return False
            self._path.unlink()
        except FileNotFoundError:
            return True
        finally:
            self._claim.unlink(missing_ok=True)
        if seen.host != host_name():
            log.warning("%s was left behind by process %s of %s: taken over", self._path, seen.pid, seen.host)
        return True

    def _is_claimed(self) -> bool:
        """Make the claim, in place of one whose maker was killed over it; False if another process has it."""
        with suppress(FileNotFoundError):
            other = _look(self._claim)
            if not is_left_behind(self._claim, other.host, other.pid, STALE_S):
                return False
            if _look(self._claim) == other:
                self._claim.unlink()
        return self._is_written(self._claim)

    def _is_dead(self, seen: _Seen) -> bool:
        if self._locked and seen.host == host_name():
            return True
        if is_left_behind(self._path, seen.host, seen.pid, STALE_S):
            return True
        if not self._locked:
            return False
        if not self._told:
            log.info("%s names process %s of %s: watching whether it is touched", self._path, seen.pid, seen.host)
        self._told = True
        end_s = time.monotonic() + WATCH_S
        while _look(self._path) == seen:
            if time.monotonic() > end_s:
                return True
            time.sleep(_POLL_S)
        return False

    def _touch(self) -> None:
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
        with suppress(FileNotFoundError):
            if self._path.read_text() == self._name:
                self._path.unlink()


def _named(path: Path) -> str:
    try:
        return f": {_look(path).owner or 'just now'}"
    except FileNotFoundError:  # it has just ended
        return ""


class _Seen(NamedTuple):
    """An owner file as it was at some time; without host and pid, it was just created."""

    owner: str
    mtime_ns: int

    @property
    def host(self) -> str | None:
        return self.owner.split()[0] if self.owner else None

    @property
    def pid(self) -> str | None:
        return next((word for word in self.owner.split()[1:2] if word.isdecimal()), None)


def _look(path: Path) -> _Seen:
    """The file, opened anew, so that NFS asks its server."""
    with open(path, errors="replace") as file:
        return _Seen(file.read(1000).strip(), os.fstat(file.fileno()).st_mtime_ns)
