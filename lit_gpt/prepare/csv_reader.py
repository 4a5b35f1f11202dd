"""A reader of .csv and .tsv files whose first line names the columns.

Costs: one core parses about 100 MB/s, for all workers.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator

from lit_gpt.cli import BadInput
from lit_gpt.prepare.line_reader import BOM
from lit_gpt.prepare.records import MAX_DOCUMENT_BYTES, Cutter, Fields, Piece, Reject, Row, packed
from lit_gpt.prepare.streams import Stream, blocks

_DELIMITERS = ",;\t"


class _Damaged(Exception):
    """The lines end early."""


def csv_pieces(stream: Stream, file: int, fields: Fields) -> Iterator[Piece]:
    """The rows of the file; a row's line is that of its first character. Raises BadInput without a text column."""
    return packed(Cutter(file, stream.raw.tell), _rows(stream, fields))


def _rows(stream: Stream, fields: Fields) -> Iterator[Row | Reject]:
    csv.field_size_limit(MAX_DOCUMENT_BYTES)
    lines = _lines(stream)
    try:
        header = next(lines, "")
        columns, delimiter = _columns(header, fields)
    except _Damaged as error:
        yield Reject(1, "cut short", str(error))
        return
    text = next(columns.index(name) for name in (fields.text, *fields.otherwise) if name in columns)
    id = columns.index(fields.id) if fields.id in columns else None
    further = [number for number in range(len(columns)) if number not in (text, id)] if fields.others else None
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        line = 2 + reader.line_num
        try:
            values = next(reader)
        except StopIteration:
            return
        except _Damaged as error:
            yield Reject(line, "cut short", str(error))
            return
        except csv.Error as error:
            if "limit" in str(error) or "unexpected end" in str(error):
                yield Reject(line, "cut short", f"a quote is never closed ({error})")
                return
            yield from _bad_row(line, 1 + reader.line_num, str(error))
            continue
        if not values:  # a blank line
            continue
        if len(values) != len(columns):
            yield from _bad_row(line, 1 + reader.line_num, f"{len(values)} values, {len(columns)} columns")
            continue
        others = {columns[at]: _encoded(values[at]).decode("utf-8", "replace") for at in further} if further else None
        yield Row(line, _encoded(values[text]), None if id is None else _encoded(values[id]), others)


def _bad_row(first: int, last: int, detail: str) -> Iterator[Reject]:
    """A reject for each line: an unmatched quote makes one row of many lines, which may have been a row each."""
    begun = f", in the row that begins in line {first}" if last > first else ""
    for line in range(first, last + 1):
        yield Reject(line, "bad CSV", detail + begun)


def _columns(header: str, fields: Fields) -> tuple[list[str], str]:
    """The names of the columns, and the delimiter: the first that gives a column for the text."""
    for delimiter in _DELIMITERS:
        try:
            columns = next(csv.reader([header], delimiter=delimiter, strict=True), [])
        except csv.Error:
            continue
        if any(name in columns for name in (fields.text, *fields.otherwise)):
            return columns, delimiter
    raise BadInput(
        f"has no column {fields.text!r} in its first line (names between commas, semicolons or tabs): "
        f"{header.strip()[:100]!r}. --text_field names the text's"
    )


def _lines(stream: Stream) -> Iterator[str]:
    """Lines with their ends; bytes that are no UTF-8 become lone surrogates."""
    kept = bytearray()
    first = True
    for block, damage in blocks(stream):
        kept += block
        if first:
            kept = kept.removeprefix(BOM)
            first = False
        if end := kept.rfind(b"\n") + 1:
            for line in bytes(kept[:end]).splitlines(keepends=True):
                yield line.decode("utf-8", "surrogateescape")
            del kept[:end]
        if damage:
            raise _Damaged(damage)
        if len(kept) > MAX_DOCUMENT_BYTES:
            raise _Damaged(f"a line of more than {MAX_DOCUMENT_BYTES} bytes")
    if kept:
        yield kept.decode("utf-8", "surrogateescape")


def _encoded(value: str) -> bytes:
    return value.encode("utf-8", "surrogateescape")
