"""The shard cache: a node's copies of the shards that the run reads now and next, on local disk or in memory.

    <--cache_dir>/llammlein-shards/CACHEDIR.TAG                says whose folder it is; the folder is born with it
                                   lock
                                   <data set>/00000.tokens     the copies

The processes of a node share one cache. The one that holds its lock is the stager: its thread copies the wanted shards
in order, hashes each while it copies, and publishes it; the others find the files. A copy's name holds data set and
shard, so any job's copy serves every job. A stager that dies leaves at most a partial file, which the next stager
removes, and the kernel releases its lock.

Invariants: nothing outside the folder with our tag is ever touched, and in it only copies and their partial files. The
copies stay within the size limit; those that are no longer wanted are removed first, oldest first.
Reading never waits for the cache: a shard that is not staged yet, or cannot be (no space, no folder, another job's
lock), is read from its source; failures are logged as warnings. Only damage stops the run: a shard whose copies have
the wrong hash COPY_TRIES times.
Costs: two pools of 64 shards of 128 MB are 17 GB; copying takes one core about 1 s per GB.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from lit_gpt.cli import BadInput
from lit_gpt.data.token_store import HEADER_BYTES, DamagedShard, Shard, ShardFile, TokenStore
from lit_gpt.files import publishing, sweep
from lit_gpt.locks import Lock, LockHeld

log = logging.getLogger(__name__)

COPY_TRIES = 3
FOLDER = "llammlein-shards"
"""The cache's own folder in --cache_dir."""
TAG = "CACHEDIR.TAG"
TAG_TEXT = """Signature: 8a477f597d28d172789f06886806bc55
# Copies of token shards, made and removed by LLaMmlein's training program (--cache_dir). Safe to delete.
"""
"""The signature is that of https://bford.info/cachedir/: backups pass over such a folder."""
_DATA_SET = re.compile(r"[0-9a-f]{16}")
"""Names of the folders of copies: the first digits of a data set's id."""
_CHUNK_BYTES = 4 << 20
_POLL_S = 0.5
"""Seconds between a process's looks for what others staged."""
_PAUSE_S = 60.0
"""Seconds until the next try after a failed copy: a full disk stays full for a while."""


class Wanted(NamedTuple):
    """A shard of a store."""

    store: TokenStore
    shard: Shard

    @property
    def file(self) -> str:
        """Path of the copy, relative to the cache folder."""
        return f"{self.store.dataset_id[:16]}/{self.shard.name}.tokens"


class CacheReport(NamedTuple):
    """What the cache has done for this process so far."""

    hits: int
    """Reads of rows from a copy."""
    misses: int
    """Reads of rows from the source."""
    staged_bytes: int
    staged_s: float
    """Seconds spent copying."""


class StagedFile:
    """An open copy, memory-mapped. The source never is: truncating a mapped file kills the process that reads it."""

    def __init__(self, folder: Path, wanted: Wanted) -> None:
        with ShardFile(folder, wanted.shard, wanted.store) as file:
            self.path = file.path
            tokens = wanted.shard.tokens
            self._tokens = np.memmap(file.path, file.dtype, mode="r", offset=HEADER_BYTES, shape=(tokens,))

    def read(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Token ids [start, stop) of the shard."""
        return self._tokens[start:stop]

    def close(self) -> None:
        """The mapping ends with the last array that views it."""
        del self._tokens


class _Closed(Exception):
    """The cache was closed while it copied."""


def refuse_foreign(cache_dir: Path) -> None:
    """Raise BadInput if `cache_dir` holds a data set, or if the cache's own folder in it is somebody else's."""
    for folder in (cache_dir, *_folders(cache_dir)):
        if not _DATA_SET.fullmatch(folder.name) and folder.name != FOLDER and any(folder.glob("*.tokens")):
            raise BadInput(
                f"--cache_dir {cache_dir}: {folder} holds a data set. Choose a folder of its own, on the node's disk "
                "or in memory"
            )
    own = cache_dir / FOLDER
    if own.exists() and not _is_ours(own):
        raise BadInput(
            f"--cache_dir {cache_dir}: {own} was not made by this program ({TAG} is missing or another's). Choose "
            "another folder, or remove it"
        )


def _folders(folder: Path) -> list[Path]:
    try:
        return [path for path in folder.iterdir() if path.is_dir() and not path.is_symlink()]
    except OSError:  # missing, a file, or closed to us: the cache will say so when it wants to write there
        return []


def _is_ours(own: Path) -> bool:
    try:
        return (own / TAG).read_text() == TAG_TEXT
    except (OSError, ValueError):
        return False


class ShardCache:
    """The node's cache in `cache_dir`, as one process reads it and, if it holds the lock, fills it.

    limit_bytes: most bytes of all copies.
    """

    def __init__(self, cache_dir: Path, limit_bytes: int) -> None:
        self._folder = cache_dir / FOLDER
        self._limit_bytes = limit_bytes
        self._wanted: tuple[Wanted, ...] = ()
        self._present: frozenset[str] = frozenset()
        self._failure: DamagedShard | None = None
        self._lock: Lock | None = None
        self._hits = self._misses = self._staged_bytes = 0
        self._staged_s = 0.0
        self._closed = threading.Event()
        self._changed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="shard-cache", daemon=True)
        self._thread.start()

    def want(self, shards: Iterable[Wanted]) -> None:
        """Set the wanted shards: those that are read now, then those that are read next."""
        wanted = tuple({item.file: item for item in shards}.values())  # the next epoch's pool may hold the same shards
        if wanted != self._wanted:
            self._wanted = wanted
            self._changed.set()

    def open(self, wanted: Wanted) -> StagedFile | None:
        """The verified copy of a shard; None where there is none. Raises DamagedShard if the stager met damage."""
        if self._failure:
            raise self._failure
        if wanted.file not in self._present:
            return None
        try:
            return StagedFile((self._folder / wanted.file).parent, wanted)
        except (DamagedShard, OSError) as error:  # removed by another job's stager, or damaged since
            log.warning("cache: %s; the shard is read from its source", error)
            self._present -= {wanted.file}
            return None

    def count(self, *, hit: bool) -> None:
        """Count a read of rows: from a copy, or from the source."""
        self._hits += hit
        self._misses += not hit

    def report(self) -> CacheReport:
        return CacheReport(self._hits, self._misses, self._staged_bytes, self._staged_s)

    def close(self) -> None:
        """Stop staging; the copies stay for the next job."""
        self._closed.set()
        self._changed.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            while not self._closed.is_set():
                self._changed.clear()
                pause_s = _POLL_S
                try:
                    self._work()
                except OSError as error:
                    log.warning("cache %s: %s; shards are read from their source", self._folder, error)
                    pause_s = _PAUSE_S
                self._changed.wait(pause_s)
        except _Closed:
            return
        except DamagedShard as error:
            self._failure = error
        finally:
            if self._lock is not None:
                self._lock.close()

    def _work(self) -> None:
        """List the copies; as the stager, make the missing ones."""
        self._make_own_folder()
        self._present = frozenset(self._files())
        if not self._is_stager():
            return
        kept, used = [], 0
        for wanted in self._wanted:
            used += wanted.shard.bytes
            if used > self._limit_bytes:
                break
            kept.append(wanted)
        missing = [wanted for wanted in kept if wanted.file not in self._present]
        before = self.report()
        for wanted in missing:
            if self._closed.is_set() or self._changed.is_set():
                return
            self._make_room(wanted.shard.bytes, {keep.file for keep in kept})
            self._stage(wanted)
            self._present |= {wanted.file}
        if missing:
            staged, seconds = self._staged_bytes - before.staged_bytes, self._staged_s - before.staged_s
            log.info(
                "cache %s: staged %d shards at %.0f MB/s; %d reads hit, %d did not",
                self._folder, len(missing), staged / 1e6 / max(seconds, 1e-9), self._hits, self._misses,
            )  # fmt: skip

    def _make_own_folder(self) -> None:
        """Make the folder, born with its tag by one rename; OSError if it is there without the tag."""
        if not self._folder.exists():
            self._folder.parent.mkdir(parents=True, exist_ok=True)
            try:
                sweep(self._folder.parent, self._folder.name)
                with publishing(self._folder, folder=True) as partial:
                    (partial / TAG).write_text(TAG_TEXT)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # else another process was quicker
                    raise
        if not _is_ours(self._folder):
            raise FileExistsError(errno.EEXIST, f"{TAG} is missing or another's: left alone", str(self._folder))

    def _files(self) -> dict[str, os.stat_result]:
        """The published copies by name, relative to the folder."""
        found = {}
        for folder in self._data_sets():
            for path in folder.glob("*.tokens"):
                try:
                    found[str(path.relative_to(self._folder))] = path.stat()
                except FileNotFoundError:  # the stager has just removed it
                    continue
        return found

    def _data_sets(self) -> list[Path]:
        """The folders of copies."""
        return [folder for folder in _folders(self._folder) if _DATA_SET.fullmatch(folder.name)]

    def _is_stager(self) -> bool:
        if self._lock is None:
            try:
                self._lock = Lock(self._folder / "lock")
            except LockHeld:
                return False
        return True

    def _make_room(self, needed_bytes: int, keep: set[str]) -> None:
        """Remove partial files and, as far as the size limit requires it, copies that are not in `keep`."""
        for folder in self._data_sets():
            sweep(folder, alone=True)
        files = self._files()
        used = sum(stat.st_size for stat in files.values())
        spare = sorted(files.keys() - keep, key=lambda name: files[name].st_mtime)
        while used + needed_bytes > self._limit_bytes and spare:
            name = spare.pop(0)
            self._present -= {name}
            (self._folder / name).unlink()  # a process that has it open keeps it until it closes it
            used -= files[name].st_size

    def _stage(self, wanted: Wanted) -> None:
        begin = time.perf_counter()
        target = self._folder / wanted.file
        target.parent.mkdir(exist_ok=True)
        with publishing(target) as partial:
            for attempt in range(1, COPY_TRIES + 1):
                digest = self._copy(wanted.store.path / f"{wanted.shard.name}.tokens", partial)
                if digest == wanted.shard.xxh3:
                    break
                name, source = wanted.shard.name, wanted.store.path
                log.warning("cache: shard %s of %s: copy %d has the wrong hash", name, source, attempt)
            else:
                _explain_damage(wanted)
        self._staged_bytes += wanted.shard.bytes
        self._staged_s += time.perf_counter() - begin

    def _copy(self, source: Path, partial: Path) -> str:
        """Copy; returns the xxh3 of what was copied."""
        running = xxhash.xxh3_64()
        with open(source, "rb", buffering=0) as reader, open(partial, "wb", buffering=0) as writer:
            while chunk := reader.read(_CHUNK_BYTES):
                if self._closed.is_set():
                    raise _Closed
                running.update(chunk)
                view = memoryview(chunk)
                while view:
                    view = view[writer.write(view) :]
        return running.hexdigest()


def _explain_damage(wanted: Wanted) -> None:
    """Raise DamagedShard, naming the block if the source is damaged."""
    with ShardFile(wanted.store.path, wanted.shard, wanted.store) as file:
        file.verify()
    raise DamagedShard(f"{file.path}: {COPY_TRIES} copies have the wrong hash, though the file itself verifies")
