"""An index of a store's documents: in which shard a document lies, and which documents a span of tokens meets.

    <folder>/<data set>/00000.arrow   end, id: of each document, in the shard's order
                                      hash, place: xxh3 of each id, ascending, and the document's number in the shard

Invariants: the store determines the files, so they may be deleted. A shard's file is built at the first question about
it, and published whole.
Costs: some 0.1 s and 8 MB per shard of 64 Mi tokens, once; then a question reads a few pages of the mapped file.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from lit_gpt.cli import BadInput
from lit_gpt.data.token_store import TokenStore, documents
from lit_gpt.files import publishing, sweep


class Location(NamedTuple):
    """A document: tokens [begin, end) of a shard."""

    shard: int
    begin: int
    end: int


class ShardDocuments(NamedTuple):
    """The index of one shard; its fields are the columns of its file."""

    ends: NDArray[np.int64]
    ids: pa.StringArray
    hashes: NDArray[np.uint64]
    places: NDArray[np.int32]

    def begin(self, document: int) -> int:
        return int(self.ends[document - 1]) if document else 0


class DocumentIndex:
    """The documents of one store."""

    def __init__(self, folder: Path, store: TokenStore) -> None:
        self._folder = folder / store.dataset_id[:16]
        self._store = store
        self._loaded: dict[int, ShardDocuments] = {}

    def shard(self, number: int) -> ShardDocuments:
        """The index of shard `number`, built if missing; BadInput if it cannot be written."""
        if number not in self._loaded:
            path = self._folder / f"{self._store.shards[number].name}.arrow"
            if not path.exists():
                self._build(path, number)
            batch = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
            self._loaded[number] = ShardDocuments(
                batch["end"].to_numpy(), batch["id"], batch["hash"].to_numpy(), batch["place"].to_numpy()
            )
        return self._loaded[number]

    def find(self, document_id: str) -> Location | None:
        """Where a document lies; None where the store has no such id."""
        wanted = np.uint64(xxhash.xxh3_64_intdigest(document_id.encode()))
        for number in range(len(self._store.shards)):
            here = self.shard(number)
            for nth in range(int(np.searchsorted(here.hashes, wanted)), len(here.hashes)):
                if here.hashes[nth] != wanted:
                    break
                place = int(here.places[nth])
                if here.ids[place].as_py() == document_id:
                    return Location(number, here.begin(place), int(here.ends[place]))
        return None

    def _build(self, path: Path, number: int) -> None:
        table = documents(self._store, self._store.shards[number], ["end", "id"]).combine_chunks()
        hashes = np.array([xxhash.xxh3_64_intdigest(name.encode()) for name in table["id"].to_pylist()], np.uint64)
        places = np.argsort(hashes, kind="stable").astype(np.int32)
        table = table.append_column("hash", pa.array(hashes[places])).append_column("place", pa.array(places))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not self._loaded:  # the first question: one look into the folder is enough
                sweep(path.parent)
            with (
                publishing(path) as partial,
                pa.OSFile(str(partial), "wb") as file,
                pa.ipc.new_file(file, table.schema) as writer,
            ):
                writer.write_table(table)
        except OSError as error:
            raise BadInput(f"cannot index documents in {path.parent} ({error}): give --index_dir") from None
