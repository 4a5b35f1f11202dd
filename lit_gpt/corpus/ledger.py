"""The ledger: a row for each document or paragraph that was removed, and for each stretch that was masked.

Invariant: a document's source text without the paragraphs of its rows, and with its masks replaced, is its text in the
corpus, byte for byte; a document with a row for the whole is not in the corpus.
Costs: about 25 bytes a row on disk.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lit_gpt.files import publishing

SCHEMA = pa.schema(
    [
        ("document_id", pa.string()),
        ("source_file", pa.dictionary(pa.int32(), pa.string())),
        ("line", pa.int64()),
        ("stage", pa.dictionary(pa.int8(), pa.string())),
        ("rule", pa.dictionary(pa.int8(), pa.string())),
        ("value", pa.float64()),
        ("threshold", pa.float64()),
        ("paragraph", pa.int32()),
        ("start_byte", pa.int64()),
        ("length_bytes", pa.int64()),
        ("duplicate_of_document", pa.string()),
        ("duplicate_of_paragraph", pa.int32()),
        ("replacement", pa.string()),
    ]
)
ROW_GROUP_ROWS = 1 << 14
ORDER = [(name, "ascending") for name in ("file", "line", "order", "start_byte")]
ROWS = pa.schema([("file", pa.int32()), *SCHEMA])
"""Of rows before they are published: with the number of the source file."""


class Row(NamedTuple):
    """A row of the ledger. paragraph: None stands for the whole document."""

    file: int
    document_id: str
    source_file: str
    line: int
    stage: str
    rule: str
    value: float | None
    threshold: float | None
    paragraph: int | None
    start_byte: int
    length_bytes: int
    duplicate_of_document: str | None = None
    duplicate_of_paragraph: int | None = None
    replacement: str | None = None


class Rows:
    """The rows of one task, in the order of the documents. A row takes some 100 bytes of memory."""

    def __init__(self) -> None:
        self._rows: list[Row] = []
        self._tables: list[pa.Table] = []

    def add(self, row: Row) -> None:
        self._rows.append(row)
        if len(self._rows) == ROW_GROUP_ROWS:
            self._pack()

    def _pack(self) -> None:
        columns = list(zip(*self._rows, strict=True)) or [()] * len(ROWS)
        arrays = [pa.array(column, field.type) for column, field in zip(columns, ROWS, strict=True)]
        self._tables.append(pa.table(arrays, ROWS))
        self._rows = []

    def table(self) -> pa.Table:
        self._pack()
        return pa.concat_tables(self._tables).unify_dictionaries()


def write_rows(path: Path, table: pa.Table) -> None:
    """Publish rows that a later pass reads again."""
    with publishing(path) as partial:
        pq.write_table(table, partial, compression="zstd")


def read_rows(path: Path) -> pa.Table:
    with open(path, "rb") as file:
        return pq.read_table(file)


def write_ledger(path: Path, tables: Sequence[pa.Table]) -> pa.Table:
    """Publish a part of the ledger, in the order of the source; returns it."""
    table = pa.concat_tables([ROWS.empty_table(), *tables])
    whole_first = table.append_column("order", pc.fill_null(table["paragraph"], -1))
    table = table.take(pc.sort_indices(whole_first, sort_keys=ORDER)).unify_dictionaries()
    with publishing(path) as partial:
        pq.write_table(table.select(SCHEMA.names), partial, compression="zstd", row_group_size=ROW_GROUP_ROWS)
    return table


def by_document(table: pa.Table) -> Iterator[tuple[tuple[int, int], list[dict[str, Any]]]]:
    """((file, line), its rows) for each document, in the table's order."""
    for key, rows in groupby(dictionaries(table), key=itemgetter("file", "line")):
        yield key, list(rows)


def dictionaries(table: pa.Table) -> Iterator[dict[str, Any]]:
    for batch in table.to_batches(1 << 12):
        yield from batch.to_pylist()


def ledger_files(folder: Path) -> Iterable[Path]:
    return sorted((folder / "removed").glob("*.parquet"))
