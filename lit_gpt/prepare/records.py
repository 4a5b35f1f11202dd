"""What the readers of this room hand on: pieces of a file, and the documents and rejects that they hold.

Invariants: every record of a file becomes one Document or one Reject; a blank line is no record; a bad record affects
no other. Parsing is apart from reading, so that any process can do it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

PIECE_BYTES = 1 << 20
PIECE_ROWS = 1024
MAX_DOCUMENT_BYTES = 16 << 20
"""A longer record (of a table: text) is rejected as "too long": it is a broken file rather than a document."""
DAMAGE = ("cut short", "damaged")
"""Kinds of reject that stand for what could not be read: the rest of a file; a row that a table's index names."""


class Fields(NamedTuple):
    """Names of the fields (of a table: columns) that hold a document; `a.b` is the field b of the object a."""

    text: str = "text"
    id: str = "id"
    """Empty: records have no id and are named after file and line."""
    otherwise: tuple[str, ...] = ()
    """Columns for the text, in this order, of a table that has no column `text`."""
    others: bool = False
    """Read a record's other fields too."""


class SourceFile(NamedTuple):
    path: Path
    name: str
    """Its name in the ledger and the store: the path relative to the folder in which it was found."""
    bytes: int
    mtime_ns: int
    format: str
    """A key of source_files.FORMATS."""
    compression: str
    """A key of streams.MAGIC, or empty."""
    folder: Path | None
    """The given folder in which it was found; None if it was given itself."""


class Row(NamedTuple):
    """A record that was read field by field."""

    line: int
    text: bytes | None
    id: bytes | int | None
    others: dict[str, Any] | None = None
    """Values that JSON can hold."""


class Document(NamedTuple):
    line: int
    id: str
    """Empty where the record has none."""
    text: str
    text_bytes: bytes
    others: dict[str, Any] | None = None
    """The record's other fields, if Fields asks for them."""


class Reject(NamedTuple):
    line: int
    kind: str
    """empty, bad JSON, bad CSV, no text, bad UTF-8, lone surrogate, too long, or one of DAMAGE; build_ledger.py adds
    duplicate id."""
    detail: str


class Piece(NamedTuple):
    """Consecutive records of one file: about PIECE_BYTES, or one record."""

    file: int
    number: int
    line: int
    """Line (or row, or number in a JSON array) of the first record, from 1."""
    source_bytes: int
    """Bytes of the file, as stored on disk, that were read for this piece."""
    payload: bytes | list[Row | Reject]
    """Lines of JSON, or records."""

    @property
    def damage(self) -> Reject | None:
        """The first reject that stands for what could not be read."""
        if isinstance(self.payload, bytes):
            return None
        return next((row for row in self.payload if isinstance(row, Reject) and row.kind in DAMAGE), None)


class Cutter:
    """Numbers the pieces of one file; `position` says how many of its bytes were read so far."""

    def __init__(self, file: int, position: Callable[[], int]) -> None:
        self._file, self._position = file, position
        self._number = self._before = 0

    def piece(self, line: int, payload: bytes | list[Row | Reject]) -> Piece:
        position = self._position()
        piece = Piece(self._file, self._number, line, position - self._before, payload)
        self._number, self._before = self._number + 1, position
        return piece


def packed(cutter: Cutter, records: Iterable[Row | Reject]) -> Iterator[Piece]:
    """Pieces of about PIECE_BYTES, and at most PIECE_ROWS, of the records of a file."""
    held: list[Row | Reject] = []
    size = 0
    for record in records:
        if isinstance(record, Row) and record.text is not None and len(record.text) > MAX_DOCUMENT_BYTES:
            record = _too_long(record.line, len(record.text))
        if isinstance(record, Row):
            more = len(record.text or b"")
            if held and size + more > PIECE_BYTES:
                yield cutter.piece(held[0].line, held)
                held, size = [], 0
            size += more
        held.append(record)
        if len(held) == PIECE_ROWS:
            yield cutter.piece(held[0].line, held)
            held, size = [], 0
    if held:
        yield cutter.piece(held[0].line, held)


def parse_piece(piece: Piece, fields: Fields) -> Iterator[Document | Reject]:
    """One Document or Reject for each record of the piece."""
    if isinstance(piece.payload, bytes):
        for number, line in enumerate(piece.payload.split(b"\n"), piece.line):
            if line.strip() and (parsed := _from_line(number, line, fields)):
                yield parsed
    else:
        for row in piece.payload:
            yield row if isinstance(row, Reject) else _from_row(row)


def field_of(record: dict[str, Any], path: str) -> Any:
    """The value of the field of that name, or of the field b of the object a for `a.b`; None if it is missing."""
    if path in record:
        return record[path]
    for at, letter in enumerate(path):
        if letter == "." and isinstance(inner := record.get(path[:at]), dict):
            return field_of(inner, path[at + 1 :])
    return None


def _from_line(number: int, line: bytes, fields: Fields) -> Document | Reject | None:
    """None for a line that is blank once it is decoded."""
    if len(line) > MAX_DOCUMENT_BYTES:
        return _too_long(number, len(line))
    try:
        decoded = line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        return Reject(number, "bad UTF-8", str(error))
    if not decoded.strip():
        return None
    try:
        record = json.loads(decoded)
    except (ValueError, RecursionError) as error:
        return Reject(number, "bad JSON", str(error))
    if not isinstance(record, dict):
        return Reject(number, "bad JSON", f"a {type(record).__name__}, not an object")
    text = field_of(record, fields.text)
    if text is None:
        return Reject(number, "no text", f"no text in field {fields.text!r}; fields: {', '.join(record)[:200]}")
    document_id = field_of(record, fields.id) if fields.id else None
    if not fields.others:
        return _checked(number, text, document_id)
    return _checked(number, text, document_id, _without(_without(record, fields.text), fields.id))


def _without(record: dict[str, Any], path: str) -> dict[str, Any]:
    """The record, from which the field that field_of finds is taken away."""
    if path in record:
        del record[path]
        return record
    for at, letter in enumerate(path):
        if letter == "." and isinstance(inner := record.get(path[:at]), dict):
            _without(inner, path[at + 1 :])
            break
    return record


def _from_row(row: Row) -> Document | Reject:
    try:
        text = None if row.text is None else row.text.decode()
        return _checked(row.line, text, row.id.decode() if isinstance(row.id, bytes) else row.id, row.others)
    except UnicodeDecodeError as error:
        return Reject(row.line, "bad UTF-8", str(error))


def _too_long(line: int, size: int) -> Reject:
    return Reject(line, "too long", f"{size} bytes, at most {MAX_DOCUMENT_BYTES}")


def _checked(number: int, text: Any, document_id: Any, others: dict[str, Any] | None = None) -> Document | Reject:
    if not isinstance(text, str):
        return Reject(number, "no text", f"the text is {type(text).__name__}")
    if not text.strip():
        return Reject(number, "empty", "the text is blank")
    name = "" if document_id is None else str(document_id)
    try:
        name.encode()
        return Document(number, name, text, text.encode(), others)
    except UnicodeEncodeError as error:
        return Reject(number, "lone surrogate", str(error))
