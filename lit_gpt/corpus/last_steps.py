"""The last steps of a pass: what it leaves for the next one, or the corpus itself."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.writers.jsonl import JsonlWriter

from lit_gpt.cli import NO_ROOM
from lit_gpt.corpus.draft import Draft
from lit_gpt.corpus.ledger import read_rows, write_ledger, write_rows
from lit_gpt.corpus.parts import Layout
from lit_gpt.corpus.ratio import MOST
from lit_gpt.corpus.survivors import KIND, NOT_MEASURED, write_survivors
from lit_gpt.corpus.task import Task
from lit_gpt.files import discard, publish, publishing

KEPT_PLACES = "kept.npy"
"""Of the last pass: the places of the documents that stay."""


class HandOnStep(PipelineStep):
    """Ends a pass that another follows: publishes the documents that came so far, rows, and counts."""

    name = "hand on"
    type = "end"

    def __init__(self, layout: Layout, number: int, task: Task) -> None:
        super().__init__()
        self._layout, self._number, self._task = layout, number, task

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Draft]:
        places, ids, ratios = [], [], []
        for draft in data:
            places.append(draft.place)
            ids.append(draft.id)
            ratios.append(draft.metadata.get("ratio", NOT_MEASURED))
            yield draft
        write_survivors(self._layout.of_pass(self._number, KIND, rank), places, ids, ratios)
        write_rows(self._layout.of_pass(self._number, "rows.parquet", rank), self._task.rows.table())
        write_counts(self._layout, self._number, rank, self._task)


def write_counts(layout: Layout, number: int, part: int, task: Task) -> None:
    with publishing(layout.of_pass(number, "ratios.npy", part)) as partial, open(partial, "wb") as file:
        np.save(file, task.ratios if task.ratios is not None else np.zeros(MOST + 1, np.int64))
    counts = {
        "counts": dict(task.counts),
        "rejects": task.rejects,
        "most": task.most,
        "samples": dict(sorted(task.samples.items())),
        "histograms": {name: histogram.as_json() for name, histogram in sorted(task.histograms.items())},
    }
    publish(layout.of_pass(number, "counts.json", part), [json.dumps(counts).encode()])


class WriteStep(JsonlWriter):
    """documents/: {"id", "text", "source", ...} a line, zstd. A part without documents has no file."""

    name = "write"

    def __init__(self, layout: Layout, source_names: list[str]) -> None:
        super().__init__(str(layout.work), "${rank}.jsonl.zst", compression=None)
        self._layout, self._names = layout, source_names
        self.adapter = self._record

    def _record(self, document: Document) -> dict[str, Any]:
        assert isinstance(document, Draft)
        others = document.others or {}
        source = others.get("source") or self._names[document.file]
        return {"id": document.id, "text": document.text, "source": source, **_further(others)}

    def _write(self, document: dict[str, Any], file_handler: Any, filename: str) -> None:
        try:
            super()._write(document, file_handler, filename)
        except TypeError:  # whole numbers beyond 64 bits, lone surrogates of other fields: orjson has none
            file_handler.write(json.dumps(document).encode() + b"\n")

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Draft]:
        final = self._layout.documents(rank)
        documents = 0
        with publishing(final) as partial, pa.CompressedOutputStream(str(partial), "zstd") as file, naming(final):
            for draft in data:
                documents += 1
                self._write(self._record(draft), file, final.name)
                yield draft
        if not documents:
            discard(final)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An error of a disk without room names `path`."""
    try:
        yield
    except OSError as error:
        if error.errno in NO_ROOM and error.filename is None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def _further(others: dict[str, Any]) -> dict[str, Any]:
    """The further fields; one whose name is taken becomes source_..."""
    taken = ("id", "text")
    return {f"source_{name}" if name in taken else name: value for name, value in others.items() if name != "source"}


class FinishPartStep(PipelineStep):
    """Ends the last pass: publishes the part's ledger, the index of its ids, and counts."""

    name = "finish part"
    type = "end"

    def __init__(self, layout: Layout, number: int, task: Task) -> None:
        super().__init__()
        self._layout, self._number, self._task = layout, number, task

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Draft]:
        counts = self._task.counts
        places = []
        for draft in data:
            places.append(draft.place)
            counts["kept_documents"] += 1
            counts["kept_bytes"] += len(draft.text.encode())
        rows = [read_rows(self._layout.of_pass(number, "rows.parquet", rank)) for number in range(self._number)]
        with publishing(self._layout.of_pass(self._number, KEPT_PLACES, rank)) as partial, open(partial, "wb") as file:
            np.save(file, np.array(places, np.int64))
        write_ledger(self._layout.removed(rank), [*rows, self._task.rows.table()])
        write_counts(self._layout, self._number, rank, self._task)
        yield from ()


class IndexStep(PipelineStep):
    """ids/: of every document that was read, the hash of its id, file and line, sorted by the hash."""

    name = "index ids"
    type = "source"

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self._layout = layout

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Draft]:
        pairs = []
        for draft in data:
            pairs.append((id_hash(draft.id), draft.place))
            yield draft
        table = np.array(pairs, np.uint64).reshape(-1, 2).T
        path: Path = self._layout.ids(rank)
        with publishing(path) as partial, open(partial, "wb") as file:
            np.save(file, table[:, np.lexsort(table[::-1])])


def id_hash(id: str) -> int:
    return xxhash.xxh3_64_intdigest(id.encode())
