"""Readers of Parquet files, and of the Arrow files that `datasets` saves.

Invariants: a Parquet file's rows that cannot be read are rejects, one each, and cost no other row group; of an Arrow
file the rest is one reject, as nothing says how many rows it had.
Costs: memory for two pages of the text column, as its writer made them, and a batch of about PIECE_BYTES; of an Arrow
file, for a record batch, as its writer made it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lit_gpt.cli import BadInput
from lit_gpt.prepare.records import PIECE_BYTES, PIECE_ROWS, Cutter, Fields, Piece, Reject, Row, SourceFile, packed
from lit_gpt.prepare.streams import looks_like, raise_if_disk

_BUFFER_BYTES = 1 << 20
_ARROW_FILE = b"ARROW1"
_ARROW_STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"
_DAMAGE = (pa.ArrowException, OSError, ValueError, KeyError, IndexError, TypeError, MemoryError)
"""What pyarrow raises for damaged files."""


def table_pieces(source: SourceFile, file: int, fields: Fields) -> Iterator[Piece]:
    """The rows of a Parquet or Arrow file. Raises BadInput if it cannot be opened, or lacks the columns."""
    if source.format == "parquet":
        with _parquet(source) as table:
            progress = [0]
            rows = _parquet_rows(table, _find_columns(table.schema_arrow, fields), source.bytes, progress)
            yield from packed(Cutter(file, lambda: progress[0]), rows)
    else:
        with open(source.path, "rb") as raw:
            yield from packed(Cutter(file, raw.tell), _arrow_rows(raw, fields))


@contextmanager
def _parquet(source: SourceFile) -> Iterator[pq.ParquetFile]:
    """Without pre_buffer, which would keep the bytes of whole row groups.

    pyarrow holds a page twice, as stored and decompressed; nothing smaller than a page can be read.
    """
    pa.default_memory_pool().release_unused()  # what was freed before: new pages would come on top of it
    with open(source.path, "rb") as raw:  # pyarrow itself opens no path that is not UTF-8
        head = raw.read(64)
        try:
            table = pq.ParquetFile(raw, buffer_size=_BUFFER_BYTES, pre_buffer=False, page_checksum_verification=True)
            groups = [table.metadata.row_group(group).num_rows for group in range(table.num_row_groups)]
            if table.metadata.num_rows != sum(groups) or min(groups, default=0) < 0:
                raise ValueError(f"its footer counts {table.metadata.num_rows} rows, and {sum(groups)} in row groups")
        except _DAMAGE as error:
            raise_if_disk(error)
            what = None if head.startswith(b"PAR1") else looks_like(head)
            raise BadInput(f"is not a Parquet file, or is cut short ({what or _line(error)})") from None
        yield table


def _parquet_rows(table: pq.ParquetFile, columns: _Columns, size: int, progress: list[int]) -> Iterator[Row | Reject]:
    """`progress` holds how many of the file's `size` bytes the rows so far stand for."""
    line = 1
    total = max(1, table.metadata.num_rows)
    for group in range(table.num_row_groups):
        end = line + table.metadata.row_group(group).num_rows
        damage = "its row group holds fewer rows than the footer says"
        try:
            batch_rows = _batch_rows(table.metadata.row_group(group))
            for batch in table.iter_batches(batch_rows, [group], columns.names, use_threads=False):
                for row in columns.rows(batch, line):
                    line = row.line + 1
                    progress[0] = size * min(row.line, total) // total
                    yield row
        except _DAMAGE as error:
            raise_if_disk(error)
            damage = _line(error)
        for lost in range(line, end):
            progress[0] = size * min(lost, total) // total
            yield Reject(lost, "damaged", damage)
        line = max(line, end)


def _batch_rows(group: Any) -> int:
    """How many rows have about PIECE_BYTES, all columns counted: of an encrypted column pyarrow knows no size."""
    return int(max(1, min(PIECE_ROWS, PIECE_BYTES * group.num_rows // max(1, group.total_byte_size))))


def _arrow_rows(raw: Any, fields: Fields) -> Iterator[Row | Reject]:
    """The rows of an Arrow file, in its stream or its file format."""
    head = raw.read(len(_ARROW_FILE))
    raw.seek(0)
    line = 1
    try:
        opened = pa.ipc.open_file if head == _ARROW_FILE else pa.ipc.open_stream
        columns = _find_columns(opened(raw).schema, fields)
        raw.seek(0)
        batches: Iterator[pa.RecordBatch]
        options = pa.ipc.IpcReadOptions(use_threads=False, included_fields=columns.indices)
        if head == _ARROW_FILE:
            reader = opened(raw, options=options)
            batches = map(reader.get_batch, range(reader.num_record_batches))
        else:
            batches = _stream_batches(opened(raw, options=options), raw)
        for batch in batches:
            for row in columns.rows(batch, line):
                line = row.line + 1
                yield row
    except BadInput:
        raise
    except _DAMAGE as error:
        raise_if_disk(error)
        if line == 1:
            raise BadInput(f"is not an Arrow file, or is cut short ({looks_like(head) or _line(error)})") from None
        yield Reject(line, "cut short", _line(error))


def _stream_batches(reader: Any, raw: Any) -> Iterator[pa.RecordBatch]:
    yield from reader
    raw.seek(-len(_ARROW_STREAM_END), 2)
    if raw.read() != _ARROW_STREAM_END:
        raise ValueError("the mark at the end of the stream is missing")


class _Columns:
    """The columns of a table that hold text and id: names as in Fields; no id if the table has none.

    others: read the other columns too, but for those that hold a text or an id inside.
    """

    def __init__(self, schema: pa.Schema, text: str, id: str | None, others: bool) -> None:
        self.text, self._id = text, id
        self.names = [text] if id is None else [text, id]
        tops = {name if name in schema.names else _parts(schema, name)[0] for name in self.names}
        self._others = [name for name in schema.names if name not in tops and schema.names.count(name) == 1]
        self._others *= others
        self.names += self._others
        self.indices = [number for number, name in enumerate(schema.names) if name in {*tops, *self._others}]

    def rows(self, batch: pa.RecordBatch, line: int) -> Iterator[Row]:
        """The rows of `batch`, of which the first has number `line`; a slice at a time, for the sake of memory."""
        for start in range(0, batch.num_rows, PIECE_ROWS):
            part = batch.slice(start, PIECE_ROWS)
            texts = _values(part, self.text)
            ids = [None] * part.num_rows if self._id is None else _values(part, self._id)
            others = _other_values(part, self._others)
            for number, (text, id, other) in enumerate(zip(texts, ids, others, strict=True), line + start):
                yield Row(number, text, id, other)


def _find_columns(schema: pa.Schema, fields: Fields) -> _Columns:
    """The columns for `fields`. Raises BadInput if there is none for the text, or one has an unreadable type."""
    text = next((name for name in (fields.text, *fields.otherwise) if _type_of(schema, name) is not None), None)
    if text is None:
        raise BadInput(
            f"has no column {fields.text!r}. Columns: {', '.join(schema.names)} (--text_field names the text's)"
        )
    id = fields.id if fields.id and _type_of(schema, fields.id) is not None else None
    for name in (text, id):
        if name is None:
            continue
        kind = _type_of(schema, name)
        if schema.names.count(name.partition(".")[0]) > 1:
            raise BadInput(f"has two columns {name!r}")
        if not _is_text(kind) and not (name == id and (pa.types.is_integer(kind) or pa.types.is_null(kind))):
            others = "--text_field names another" if name == text else "--id_field names another, or '' for none"
            raise BadInput(f"column {name!r} is of type {kind}, it must be string ({others})")
    return _Columns(schema, text, id, fields.others)


def _type_of(schema: pa.Schema, path: str) -> pa.DataType | None:
    """The type of a column, or of a field in a column of structs; None if it is missing."""
    if path in schema.names:
        return schema.field(schema.names.index(path)).type
    parts = _parts(schema, path)
    if not parts:
        return None
    kind = schema.field(schema.names.index(parts[0])).type
    for part in parts[1:]:
        if not pa.types.is_struct(kind) or (at := kind.get_field_index(part)) < 0:
            return None
        kind = kind.field(at).type
    return kind


def _parts(schema: pa.Schema, path: str) -> list[str]:
    """The column and the fields in it that a path with dots names; empty if there is no such column."""
    first, *rest = path.split(".")
    return [first, *rest] if rest and first in schema.names else []


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    types = pa.types
    return any(
        check(kind)
        for check in (types.is_string, types.is_large_string, types.is_string_view, types.is_binary,
                      types.is_large_binary, types.is_binary_view)
    )  # fmt: skip


def _values(batch: pa.RecordBatch, path: str) -> list[Any]:
    """A column's values, strings as bytes: decoding them by pyarrow would fail for all rows at one bad row."""
    if path in batch.schema.names:
        column = batch.column(path)
    else:
        first, *rest = _parts(batch.schema, path)
        column = pc.struct_field(batch.column(first), rest)
    column.validate()  # a damaged file may hold offsets outside its buffers, which pyarrow would follow
    if pa.types.is_dictionary(column.type):
        column.indices.validate(full=True)
        column.dictionary.validate()
        column.validate(full=True)
        column = column.dictionary_decode()
    if pa.types.is_string_view(column.type):
        column = column.cast(pa.binary_view())
    elif pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        column = column.view(pa.binary() if pa.types.is_string(column.type) else pa.large_binary())
    column.validate(full=True)  # as bytes, because a row of bad UTF-8 is that row's fault alone
    return list((column.cast(pa.large_binary()) if _is_text(column.type) else column).to_pylist())


def _other_values(batch: pa.RecordBatch, names: list[str]) -> list[dict[str, Any] | None]:
    """The values of further columns, row by row, as JSON can hold them; bytes that are no UTF-8 become U+FFFD."""
    if not names:
        return [None] * batch.num_rows
    columns = []
    for name in names:
        column = batch.column(name)
        column.validate()
        if pa.types.is_dictionary(column.type):
            column.indices.validate(full=True)
            column.dictionary.validate()
        if _is_text(column.type):
            columns.append(
                [None if value is None else value.decode("utf-8", "replace") for value in _values(batch, name)]
            )
        else:
            columns.append([_json_value(value) for value in column.to_pylist()])
    return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]


def _json_value(value: Any) -> Any:
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, dict):
        return {str(name): _json_value(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_json_value(inner) for inner in value]
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
