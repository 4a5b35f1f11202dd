"""The shards that a process has open: file or staged copy, document ends, packed rows.

Invariants: after a transient error a read is tried again on a reopened shard, with growing pauses; a read that still
fails is raised, never skipped. Once the node's cache has staged a shard, the next call reads it from there.
Costs: an open shard holds a file descriptor and 4 bytes per document (other packings than `window`: 32 more per piece);
opening one of 64 Mi tokens takes some 5 ms, most of it to hash and parse its documents. At most two pools of shards per
source are open.
"""

from __future__ import annotations

import errno
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from lit_gpt.data.order import POOL_SHARDS
from lit_gpt.data.packing import Packing, Window, window_rows
from lit_gpt.data.packing_index import PackingIndex
from lit_gpt.data.shard_cache import ShardCache, StagedFile, Wanted
from lit_gpt.data.token_store import ShardFile, TokenStore, document_ends

log = logging.getLogger(__name__)

RETRY_DELAYS_S = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
"""Pauses before a failed read is tried again. A network file system that still fails after half a minute is down."""
_TRANSIENT = frozenset({errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN})

Result = TypeVar("Result")


class OpenShard(NamedTuple):
    """One shard ready for reading."""

    file: ShardFile | StagedFile
    document_ends: NDArray[Any]
    """In tokens of the shard, exclusive, ascending."""
    packing: Packing


class OpenShards:
    """Shards by source and number, opened at their first use. For one thread at a time."""

    def __init__(
        self,
        stores: Sequence[TokenStore],
        block_size: int,
        packing: str,
        cache: ShardCache | None = None,
        index_dir: Path | None = None,
    ) -> None:
        self._stores = stores
        self._block_size = block_size
        self._cache = cache
        self._indexes = (
            [PackingIndex(index_dir or store.path / "packing", store, packing, block_size) for store in stores]
            if packing != "window"
            else None
        )
        self._open: OrderedDict[tuple[int, int], OpenShard] = OrderedDict()

    def rows(self, source: int) -> Sequence[int] | NDArray[np.int64]:
        """Number of rows of each shard of a source."""
        if self._indexes:
            return self._indexes[source].rows
        return [window_rows(shard.tokens, self._block_size) for shard in self._stores[source].shards]

    def packing(self, source: int, number: int) -> Packing:
        """The rows of one shard."""
        if self._indexes:
            return self._indexes[source].load(number)
        return Window(self._stores[source].shards[number].tokens, self._block_size)

    def get(self, source: int, number: int) -> OpenShard:
        """The open shard; raises DamagedShard if its files are not the manifest's."""
        key = (source, number)
        opened = self._open.pop(key, None) or self._open_from_store(source, number)
        if self._cache:
            if not isinstance(opened.file, StagedFile) and (staged := self._cache.open(self._wanted(source, number))):
                opened.file.close()
                opened = opened._replace(file=staged)
            self._cache.count(hit=isinstance(opened.file, StagedFile))
        self._open[key] = opened
        while len(self._open) > 2 * POOL_SHARDS * len(self._stores):
            self._open.popitem(last=False)[1].file.close()
        return opened

    def with_retries(self, action: Callable[[], Result], source: int, number: int) -> Result:
        """Run `action`, which reads one shard; after a transient OSError, reopen the shard and run it again.

        Raises OSError when the last try fails, and any other error at once.
        """
        name = self._stores[source].path / self._stores[source].shards[number].name
        begin = time.monotonic()
        for tries, delay_s in enumerate((*RETRY_DELAYS_S, None), start=1):
            try:
                return action()
            except OSError as error:
                if error.errno not in _TRANSIENT:
                    raise
                waited_s = time.monotonic() - begin
                if delay_s is None:
                    said = f"{error.strerror}, {tries} times in {waited_s:.1f} s"
                    raise OSError(error.errno, said, str(name)) from error
                said = f"{error.strerror}; try {tries} failed after {waited_s:.1f} s, next in {delay_s:g} s"
                log.warning("shard %s: %s", name, said)
            if opened := self._open.pop((source, number), None):
                opened.file.close()
            time.sleep(delay_s)
        raise AssertionError("the last try returns or raises")

    def stage(self, shards: Sequence[tuple[int, int]]) -> None:
        """Ask the cache, if there is one, for these shards, in this order."""
        if self._cache:
            self._cache.want(self._wanted(source, number) for source, number in shards)

    @property
    def staging(self) -> bool:
        """Whether there is a cache."""
        return self._cache is not None

    def close(self) -> None:
        """Close every shard."""
        while self._open:
            self._open.popitem()[1].file.close()

    def _open_from_store(self, source: int, number: int) -> OpenShard:
        store = self._stores[source]
        shard = store.shards[number]
        ends = document_ends(store, shard)
        if shard.tokens < np.iinfo(np.int32).max:
            ends = ends.astype(np.int32)
        file = ShardFile(store.path, shard, store)
        file.expect_random_reads()
        return OpenShard(file, ends, self.packing(source, number))

    def _wanted(self, source: int, number: int) -> Wanted:
        store = self._stores[source]
        return Wanted(store, store.shards[number])
