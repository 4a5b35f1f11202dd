"""Sorted runs: what workers of a build put down between tokenising documents and writing shards in their final order.

An external sort by a 64-bit key. A run is a batch of documents, sorted by (key, place):

    NAME.data       id and token bytes of each document, one after the other
    NAME.index.npy  one uint64 row a field, one column a document: see the constants below
    NAME.ids.npy    (128-bit hash of the id, place), sorted, to find an id that occurs twice
    NAME.json       pieces of input that the run holds, its counts and rejects; written last

Invariants: a run without its .json does not exist; of two runs that hold a piece in common one is chosen, so nothing
is lost or doubled when a build is killed. How documents are spread over runs leaves no trace in the merged order.
Costs: 80 bytes a document beside its tokens, on disk; merging reads the indexes in ranges of MERGE_DOCUMENTS.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from lit_gpt.files import publish

Columns = npt.NDArray[np.uint64]

KEY, PLACE, CONTENT, OFFSET, ID_BYTES, TOKENS, TEXT_BYTES = range(7)
"""Rows of a document index: sort key; source file and line; hash of the text; where in .data; sizes: id, ids, text."""
ID_HIGH, ID_LOW, ID_PLACE = range(3)
"""Rows of an id index."""
LINE_BITS = 40
MERGE_DOCUMENTS = 1 << 22
"""Documents that a merge holds at a time (0.25 GB)."""


def place(file: int, line: int) -> int:
    return file << LINE_BITS | line


def file_and_line(place: int) -> tuple[int, int]:
    return place >> LINE_BITS, place & (1 << LINE_BITS) - 1


class TokenisedDocument(NamedTuple):
    key: int
    place: int
    content: int
    id_hash: int
    id: bytes
    ids: npt.NDArray[Any]
    text_bytes: int


class RunSummary(NamedTuple):
    """The .json of a run."""

    pieces: list[tuple[int, int]]
    """(file, piece), in the order they came."""
    lines: int
    documents: int
    tokens: int
    source_bytes: int
    rejects: list[tuple[int, int, str, str]]
    """(file, line, kind, detail)."""


class TokenRun(NamedTuple):
    data: Path
    documents: Columns
    ids: Columns


class ShardPlan(NamedTuple):
    """The documents of `split` from (key, place) `first` to `last`, both included."""

    split: str
    number: int
    first: tuple[int, int]
    last: tuple[int, int]
    documents: int
    tokens: int


class Choice(NamedTuple):
    """What decides on one document."""

    threshold: int
    """A text whose hash is below this is validation data."""
    duplicates: Columns
    """Places of the documents that are left out for their id."""

    def of(self, split: str, columns: Columns) -> npt.NDArray[np.bool_]:
        """Which columns of a document index belong to `split`."""
        in_val = columns[CONTENT] < np.uint64(self.threshold)
        return (in_val if split == "val" else ~in_val) & ~np.isin(columns[PLACE], self.duplicates)


def write_run(folder: Path, name: str, documents: Sequence[TokenisedDocument], summary: RunSummary) -> None:
    documents = sorted(documents, key=lambda document: (document.key, document.place))
    index = np.zeros((7, len(documents)), np.uint64)
    ids = np.zeros((3, len(documents)), np.uint64)
    sizes = [len(document.id) + document.ids.nbytes for document in documents]
    offsets = np.cumsum([0, *sizes])[:-1]
    for column, (document, offset) in enumerate(zip(documents, offsets, strict=True)):
        index[:, column] = (
            document.key, document.place, document.content, offset, len(document.id), len(document.ids),
            document.text_bytes,
        )  # fmt: skip
        ids[:, column] = (document.id_hash >> 64, document.id_hash & (1 << 64) - 1, document.place)
    publish(folder / f"{name}.data", (part for document in documents for part in (document.id, document.ids.tobytes())))
    publish(folder / f"{name}.index.npy", [_npy(index)])
    publish(folder / f"{name}.ids.npy", [_npy(ids[:, np.lexsort(ids[::-1])])])
    publish(folder / f"{name}.json", [json.dumps(summary).encode()])


def _npy(array: Columns) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def find_runs(folder: Path) -> dict[Path, RunSummary]:
    """The finished runs in `folder`, of those with a piece in common only the first by name."""
    runs: dict[Path, RunSummary] = {}
    pieces: set[tuple[int, int]] = set()
    for path in sorted(folder.glob("*.json")):
        summary = RunSummary(*json.loads(path.read_bytes()))
        own = {(file, number) for file, number in summary.pieces}
        if not own & pieces:
            pieces |= own
            runs[path] = summary
    return runs


def open_run(path: Path) -> TokenRun:
    """The run whose .json is `path`; its indexes stay on disk."""
    documents, ids = (np.load(path.with_suffix(suffix), mmap_mode="r") for suffix in (".index.npy", ".ids.npy"))
    return TokenRun(path.with_suffix(".data"), documents, ids)


def merged(sorted_arrays: Sequence[Columns]) -> Iterator[Columns]:
    """All columns of arrays that are each sorted by their first rows, in sorted order, a range of keys at a time.

    Columns with equal first row are always in one range. The rows are compared in order: the first, then the next.
    """
    arrays = [array for array in sorted_arrays if array.shape[1]]
    total = sum(array.shape[1] for array in arrays)
    if not total:
        return
    ranges = -(-total // MERGE_DOCUMENTS)
    steps = [max(1, min(1024, array.shape[1] // 16)) for array in arrays]
    sample = np.sort(np.concatenate([array[0, step // 2 :: step] for array, step in zip(arrays, steps, strict=True)]))
    inner = np.unique(sample[len(sample) * np.arange(1, ranges) // ranges])
    bounds = [
        np.concatenate([[0], np.searchsorted(array[0], inner), [array.shape[1]]]).astype(np.int64) for array in arrays
    ]
    for part in range(len(inner) + 1):
        slices = [array[:, bound[part] : bound[part + 1]] for array, bound in zip(arrays, bounds, strict=True)]
        columns = np.concatenate(slices, axis=1)
        yield columns[:, np.lexsort((columns[1], columns[0]))]


def duplicate_places(runs: Sequence[TokenRun]) -> Columns:
    """(place, place of the first with the same id) of every document whose id came before, sorted by place."""
    found = [np.zeros((2, 0), np.uint64)]
    for columns in merged([run.ids for run in runs]):
        columns = columns[:, np.lexsort(columns[::-1])]
        same = np.all(columns[:2, 1:] == columns[:2, :-1], axis=0)
        starts = np.concatenate([[True], ~same])
        first = columns[ID_PLACE, starts][np.cumsum(starts) - 1]
        found.append(np.stack([columns[ID_PLACE], first])[:, ~starts])
    duplicates = np.concatenate(found, axis=1)
    return duplicates[:, np.argsort(duplicates[0])]
