"""The documents of a store's shards, laid out for questions: where a document lies, which documents a span meets.

    <folder>/<data set>/00000.arrow   end, id: in the shard's order; hash, place: the ids' xxh3 ascending, and whose

Invariants: nothing here that the store does not determine; a file is made at the first question about its shard,
appears by rename, and may be deleted.
Costs: some 0.1 s and 8 MB a shard of 64 Mi tokens, once; then a question maps the file and reads a few pages of it.
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
    """Tokens [begin, end) of a shard that are one document."""

    shard: int
    begin: int
    end: int


class ShardDocuments(NamedTuple):
    """The documents of one shard, in order."""

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
        """The documents of a shard."""
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
        """Where a document lies; None where the store has none of that id."""
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
