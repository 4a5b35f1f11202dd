"""The packing index: which pieces make the rows of a store under `bestfit` or `pad`. It is built once and kept on disk.

    <folder>/<packing>-<block_size>-<data set>-v<version>/00000.npz    the pieces of one shard, in order of row
    .../rows.npy                                                       rows of each shard; published last

Invariants: the store, the packing and the block size determine the files, so they may be deleted and built again. One
process builds; the others wait for its lock.
Costs: per shard of 64 Mi tokens, some 50 ms to build (15,000 shards: 12 minutes, once) and 1.5 MB on disk.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lit_gpt.cli import BadInput
from lit_gpt.data.packing import PACKING_VERSION, Pieces, pack
from lit_gpt.data.token_store import DamagedShard, TokenStore, document_ends
from lit_gpt.files import publishing, sweep
from lit_gpt.locks import Lock

log = logging.getLogger(__name__)

_REPORT_S = 10.0
_ARRAYS = ("first", "start", "inputs", "stop")


class PackingIndex:
    """The packed rows of a store."""

    def __init__(self, folder: Path, store: TokenStore, packing: str, block_size: int) -> None:
        """Open the index under `folder`, and build it first if it is missing.

        Raises BadInput if it cannot be written, DamagedShard if it does not fit the store.
        """
        self._folder = folder / f"{packing}-{block_size}-{store.dataset_id[:16]}-v{PACKING_VERSION}"
        self._store = store
        path = self._folder / "rows.npy"
        if not path.exists():
            self._build_once(path, packing, block_size)
        self.rows: NDArray[np.int64] = np.load(path)
        """Rows of each shard."""
        if len(self.rows) != len(store.shards):
            raise DamagedShard(f"{path}: {len(self.rows)} shards where the store has {len(store.shards)}; delete it")

    def load(self, number: int) -> Pieces:
        """The rows of shard `number`; raises DamagedShard if its file is damaged."""
        path = self._folder / f"{self._store.shards[number].name}.npz"
        try:
            with np.load(path) as arrays:
                pieces = Pieces(*(arrays[name] for name in _ARRAYS))
        except (OSError, ValueError, KeyError) as error:
            raise DamagedShard(f"{path}: {error}; delete {self._folder}; it will be built again") from error
        if pieces.rows != self.rows[number]:
            raise DamagedShard(f"{path}: {pieces.rows} rows where rows.npy says {self.rows[number]}; delete the folder")
        return pieces

    def _build_once(self, path: Path, packing: str, block_size: int) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            lock = Lock(self._folder / "lock", wait=True)
        except OSError as error:
            raise BadInput(
                f"packing={packing} keeps an index in {self._folder}, which cannot be written ({error.strerror}): "
                "give a --cache_dir"
            ) from None
        with lock:
            if not path.exists():
                sweep(self._folder, alone=True)
                self._build(path, packing, block_size)

    def _build(self, path: Path, packing: str, block_size: int) -> None:
        rows, reported = [], time.monotonic()
        for number, shard in enumerate(self._store.shards):
            pieces = pack(document_ends(self._store, shard), block_size, packing)
            _save(self._folder / f"{shard.name}.npz", {name: getattr(pieces, name) for name in _ARRAYS})
            rows.append(pieces.rows)
            if time.monotonic() - reported > _REPORT_S:
                log.info("packing (%s): %d of %d shards", packing, number + 1, len(self._store.shards))
                reported = time.monotonic()
        _save(path, np.array(rows, dtype=np.int64))


def _save(path: Path, content: Any) -> None:
    with publishing(path) as partial, open(partial, "wb") as file:
        if isinstance(content, dict):
            np.savez(file, **content)
        else:
            np.save(file, content)
