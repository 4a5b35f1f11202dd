"""Sorted runs: tokenised documents on disk, between tokenising them and writing them to shards in their final order.

This is an external sort by a 64-bit key. A run is a batch of documents, sorted by (key, place); a document's place is
its file and line in the input, in one number.

    NAME.data       id and token bytes of each document, one after the other
    NAME.index.npy  one uint64 row per field, one column per document: see the constants below
    NAME.ids.npy    (128-bit hash of the id, place), sorted, to find an id that occurs twice
    NAME.json       which pieces of the input the run holds, its counts and rejects; published last

Invariants: a run without its .json does not exist; of two runs that hold the same piece only one is used, so a killed
build neither loses nor doubles documents. The merged order does not depend on how documents are spread over runs.
Costs: on disk, 80 bytes per document beside its tokens; merging reads the indexes in ranges of MERGE_DOCUMENTS.
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
"""Rows of .index.npy: sort key, place, hash of the text, offset in .data, bytes of the id, token ids, text bytes."""
ID_HIGH, ID_LOW, ID_PLACE = range(3)
"""Rows of .ids.npy: the hash's two halves, place."""
LINE_BITS = 40
"""A place's lower bits: the line. The bits above hold the file's number."""
MERGE_DOCUMENTS = 1 << 22
"""About as many documents as a merge holds at a time (0.25 GB)."""


def place(file: int, line: int) -> int:
    return file << LINE_BITS | line


def file_and_line(place: int) -> tuple[int, int]:
    return place >> LINE_BITS, place & (1 << LINE_BITS) - 1


class TokenisedDocument(NamedTuple):
    key: int
    place: int
    content: int
    """xxh3 of the text (64 bits)."""
    id_hash: int
    """xxh3 of the id (128 bits)."""
    id: bytes
    ids: npt.NDArray[Any]
    """Token ids as stored, EOS included."""
    text_bytes: int


class RunSummary(NamedTuple):
    """The .json of a run."""

    pieces: list[tuple[int, int]]
    """(file, piece), in the order of arrival."""
    lines: int
    documents: int
    tokens: int
    source_bytes: int
    rejects: list[tuple[int, int, str, str]]
    """(file, line, kind, detail)."""


class TokenRun(NamedTuple):
    """A run, opened; its two indexes are memory-mapped."""

    data: Path
    documents: Columns
    """(7, documents): .index.npy."""
    ids: Columns
    """(3, documents): .ids.npy."""


def write_run(folder: Path, name: str, documents: Sequence[TokenisedDocument], summary: RunSummary) -> None:
    """Publish the run's four files; `documents` may come in any order."""
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
    publish(folder / f"{name}.data", [part for document in documents for part in (document.id, document.ids.data)])
    publish(folder / f"{name}.index.npy", [_npy(index)])
    publish(folder / f"{name}.ids.npy", [_npy(ids[:, np.lexsort(ids[::-1])])])
    publish(folder / f"{name}.json", [json.dumps(summary).encode()])


def _npy(array: Columns) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def find_runs(folder: Path) -> dict[Path, RunSummary]:
    """The finished runs in `folder`, by the path of their .json; of those that share a piece, the first by name."""
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
    """The run whose .json is `path`."""
    documents, ids = (np.load(path.with_suffix(suffix), mmap_mode="r") for suffix in (".index.npy", ".ids.npy"))
    return TokenRun(path.with_suffix(".data"), documents, ids)


def merged(sorted_arrays: Sequence[Columns]) -> Iterator[Columns]:
    """Merge arrays whose columns are each sorted by their first two rows; yields a range of the first row at a time.

    Columns that are equal in the first row are in one range.
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
    """(2, duplicates): the place of each document whose id occurs earlier, and the place of the id's first document.

    Sorted by place.
    """
    found = [np.zeros((2, 0), np.uint64)]
    for columns in merged([run.ids for run in runs]):
        columns = columns[:, np.lexsort(columns[::-1])]
        same = np.all(columns[:2, 1:] == columns[:2, :-1], axis=0)
        starts = np.concatenate([[True], ~same])
        first = columns[ID_PLACE, starts][np.cumsum(starts) - 1]
        found.append(np.stack([columns[ID_PLACE], first])[:, ~starts])
    duplicates = np.concatenate(found, axis=1)
    return duplicates[:, np.argsort(duplicates[0])]
