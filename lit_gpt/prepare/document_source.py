"""Read documents from .jsonl, .jsonl.gz, .jsonl.zst and .parquet files.

A file is read once, in order, in pieces of about a MiB that any process can parse. The pieces depend on the file alone,
so (file, piece) names the same records at every start.
Invariants: every line (of a Parquet file: every row) becomes one Document or one Reject; a bad line affects no other.
Costs: memory for a piece, or for the longest line up to MAX_DOCUMENT_BYTES; one core decompresses 0.2-0.4 GB/s of gzip.
"""

from __future__ import annotations

import gzip
import itertools
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from lit_gpt.cli import BadInput

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
PIECE_BYTES = 1 << 20
PIECE_ROWS = 256
MAX_DOCUMENT_BYTES = 16 << 20
"""A longer line (of a Parquet file: text) is rejected as "too long": it is a broken file rather than a document."""

_READ_BYTES = 1 << 16  # small, because the read that meets damage in an archive yields nothing
_DAMAGE = (EOFError, zlib.error, gzip.BadGzipFile)


class Fields(NamedTuple):
    """Names of the fields (of a Parquet file: columns) that hold a document."""

    text: str = "text"
    id: str = "id"


class SourceFile(NamedTuple):
    path: Path
    name: str
    """Its name in the ledger and the store: the path relative to the folder in which it was found."""
    bytes: int
    mtime_ns: int


class Piece(NamedTuple):
    """Consecutive records of one file."""

    file: int
    number: int
    line: int
    """Line (or row) of the first record, from 1."""
    lines: int
    source_bytes: int
    """Bytes of the file, as stored on disk, that were read for this piece."""
    payload: bytes | pa.RecordBatch
    reject: tuple[str, str] | None = None
    """Kind and detail, where the piece is one line that is rejected: too long, or the file is cut short in it."""


class Document(NamedTuple):
    line: int
    id: str
    """Empty where the record has none."""
    text: str
    text_bytes: bytes


class Reject(NamedTuple):
    line: int
    kind: str
    """empty, bad JSON, no text, bad UTF-8, lone surrogate, too long, cut short; build_ledger.py adds duplicate id."""
    detail: str


def find_sources(paths: Sequence[str], *, outside: Path | None = None) -> list[SourceFile]:
    """The given files and those in the given folders, each folder sorted by name; nothing below `outside`.

    Raises BadInput if a path does not exist, is of no known kind, holds no such file, or is given twice.
    """
    found: list[tuple[Path, str]] = []
    for given in map(Path, paths):
        if given.is_dir():
            inside = sorted(path for path in given.rglob("*") if _is_source(path.relative_to(given)) and path.is_file())
            kept = [path for path in inside if outside is None or outside not in path.resolve().parents]
            if not kept:
                raise BadInput(f"no {', '.join(SUFFIXES)} file in folder {given}")
            found += [(path, path.relative_to(given).as_posix()) for path in kept]
        elif not given.exists():
            raise BadInput(f"source {given}: there is no such file or folder")
        elif not _is_source(Path(given.name)):
            raise BadInput(f"source {given} is of no known kind: {', '.join(SUFFIXES)}, or a folder of them")
        else:
            found.append((given, given.name))
    names = [name for _, name in found]
    if len(set(names)) < len(names):  # two folders with equal file names: only the paths as given tell them apart
        names = [path.as_posix() for path, _ in found]
    if len(set(names)) < len(names):
        raise BadInput(f"source {next(name for name in names if names.count(name) > 1)} is given twice")
    stats = [path.stat() for path, _ in found]
    return [
        SourceFile(path, name, stat.st_size, stat.st_mtime_ns)
        for (path, _), name, stat in zip(found, names, stats, strict=True)
    ]


def _is_source(path: Path) -> bool:
    return path.name.endswith(SUFFIXES) and not any(part.startswith(".") for part in path.parts)


def check_source(source: SourceFile, fields: Fields) -> None:
    """Raise BadInput, before any work, if a file cannot be opened or a Parquet file lacks the columns."""
    try:
        with open(source.path, "rb"):
            pass
        if source.path.suffix != ".parquet":
            return
        schema = pq.read_schema(source.path)
    except pa.ArrowInvalid:
        raise BadInput(f"{source.path} is not a Parquet file, or is cut short") from None
    except OSError as error:
        raise BadInput(f"cannot read {source.path}: {error.strerror or error}") from None
    if fields.text not in schema.names:
        raise BadInput(f"{source.path} has no column {fields.text!r}. Columns: {', '.join(schema.names)}")
    for name in set(fields) & set(schema.names):
        kind = schema.field(name).type
        readable = pa.types.is_string(kind) or pa.types.is_large_string(kind)
        if not readable and not (name == fields.id and pa.types.is_integer(kind)):
            raise BadInput(f"{source.path}: column {name!r} is of type {kind}, it must be string")


def read_pieces(source: SourceFile, file: int, fields: Fields) -> Iterator[Piece]:
    """The pieces of `source`, numbered from 0; `file` is the source's number. Raises OSError if the disk fails."""
    if source.path.suffix == ".parquet":
        yield from _parquet_pieces(source, file, fields)
        return
    with open(source.path, "rb") as raw:
        if source.path.suffix == ".gz":
            with gzip.GzipFile(fileobj=raw) as unzipped:
                yield from _line_pieces(file, raw, unzipped.read1)
        elif source.path.suffix == ".zst":
            with pa.CompressedInputStream(raw, "zstd") as unzipped:
                yield from _line_pieces(file, raw, unzipped.read)
        else:
            yield from _line_pieces(file, raw, raw.read)


def _parquet_pieces(source: SourceFile, file: int, fields: Fields) -> Iterator[Piece]:
    with pq.ParquetFile(source.path) as table:
        columns = [name for name in fields if name in table.schema_arrow.names]
        rows = max(1, table.metadata.num_rows)
        batches = table.iter_batches(PIECE_ROWS, columns=columns, use_threads=False)
        line = 1
        for number in itertools.count():
            try:
                batch = next(batches, None)
            except (pa.ArrowException, OSError) as error:
                _raise_if_disk(error)
                yield Piece(file, number, line, 1, 0, b"", reject=("cut short", str(error)))
                return
            if batch is None:
                return
            end = line + batch.num_rows
            share = source.bytes * (end - 1) // rows - source.bytes * (line - 1) // rows
            yield Piece(file, number, line, batch.num_rows, share, batch)
            line = end


class _Cutter:
    """Makes numbered pieces of the lines of one file."""

    def __init__(self, file: int, raw: BinaryIO) -> None:
        self._file, self._raw = file, raw
        self._number, self._line, self._position = 0, 1, 0

    def piece(self, payload: bytes, *, reject: tuple[str, str] | None = None) -> Piece:
        lines = 1 if reject else payload.count(b"\n") + (not payload.endswith(b"\n"))
        position = self._raw.tell()
        piece = Piece(self._file, self._number, self._line, lines, position - self._position, payload, reject)
        self._number, self._line, self._position = self._number + 1, self._line + lines, position
        return piece


def _line_pieces(file: int, raw: BinaryIO, read: Callable[[int], bytes]) -> Iterator[Piece]:
    cutter = _Cutter(file, raw)
    too_long = ("too long", f"over {MAX_DOCUMENT_BYTES} bytes")
    kept = bytearray()
    skipping = False
    for block, damage in _blocks(read):
        kept += block
        if skipping:
            end = kept.find(b"\n") + 1
            del kept[: end or len(kept)]
            if end:
                yield cutter.piece(b"", reject=too_long)
                skipping = False
        if end := kept.rfind(b"\n") + 1:
            yield cutter.piece(bytes(kept[:end]))
            del kept[:end]
        if len(kept) > MAX_DOCUMENT_BYTES:
            kept.clear()
            skipping = True
        if damage:  # costs the line in which it is, complete or not
            yield cutter.piece(b"", reject=("cut short", damage))
            return
    if skipping:
        yield cutter.piece(b"", reject=too_long)
    elif kept:
        yield cutter.piece(bytes(kept))


def _blocks(read: Callable[[int], bytes]) -> Iterator[tuple[bytes, str]]:
    """The stream in blocks of exactly PIECE_BYTES, whatever a read returns, with what damage ended the last one."""
    while True:
        parts: list[bytes] = []
        size, damage = 0, ""
        try:
            while size < PIECE_BYTES and (part := read(min(_READ_BYTES, PIECE_BYTES - size))):
                parts.append(part)
                size += len(part)
        except _DAMAGE as error:
            damage = str(error)
        except OSError as error:
            _raise_if_disk(error)
            damage = str(error)
        yield b"".join(parts), damage
        if size < PIECE_BYTES:
            return


def _raise_if_disk(error: Exception) -> None:
    """Raise an error of the disk; for one of the archive, pyarrow sets no errno."""
    if isinstance(error, OSError) and error.errno is not None:
        raise error


def parse_piece(piece: Piece, fields: Fields) -> Iterator[Document | Reject]:
    """One Document or Reject for each line of the piece."""
    if piece.reject:
        yield Reject(piece.line, *piece.reject)
    elif isinstance(piece.payload, bytes):
        lines = piece.payload.split(b"\n")
        for number, line in enumerate(lines[: piece.lines], piece.line):
            yield _from_line(number, line, fields)
    else:
        texts = _raw(piece.payload, fields.text)
        ids = _raw(piece.payload, fields.id)
        for number, (text, document_id) in enumerate(zip(texts, ids, strict=True), piece.line):
            yield _from_row(number, text, document_id)


def _raw(batch: pa.RecordBatch, name: str) -> list[Any]:
    """A column's values, strings as bytes: decoding them by pyarrow would fail for all rows at one bad row."""
    if name not in batch.schema.names:
        return [None] * batch.num_rows
    column = batch.column(name)
    return (column if pa.types.is_integer(column.type) else column.cast(pa.large_binary())).to_pylist()


def _from_line(number: int, line: bytes, fields: Fields) -> Document | Reject:
    if len(line) > MAX_DOCUMENT_BYTES:
        return Reject(number, "too long", f"{len(line)} bytes, at most {MAX_DOCUMENT_BYTES}")
    try:
        decoded = line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        return Reject(number, "bad UTF-8", str(error))
    if not decoded.strip():
        return Reject(number, "empty", "blank line")
    try:
        record = json.loads(decoded)
    except (ValueError, RecursionError) as error:
        return Reject(number, "bad JSON", str(error))
    if not isinstance(record, dict):
        return Reject(number, "bad JSON", f"a {type(record).__name__}, not an object")
    return _checked(number, record.get(fields.text), record.get(fields.id))


def _from_row(number: int, text: bytes | None, document_id: bytes | int | None) -> Document | Reject:
    if text is not None and len(text) > MAX_DOCUMENT_BYTES:
        return Reject(number, "too long", f"{len(text)} bytes, at most {MAX_DOCUMENT_BYTES}")
    try:
        decoded = None if text is None else text.decode()
        return _checked(number, decoded, document_id.decode() if isinstance(document_id, bytes) else document_id)
    except UnicodeDecodeError as error:
        return Reject(number, "bad UTF-8", str(error))


def _checked(number: int, text: Any, document_id: Any) -> Document | Reject:
    if not isinstance(text, str):
        return Reject(number, "no text", f"the text is {type(text).__name__}")
    if not text.strip():
        return Reject(number, "empty", "the text is blank")
    name = "" if document_id is None else str(document_id)
    try:
        name.encode()
        return Document(number, name, text, text.encode())
    except UnicodeEncodeError as error:
        return Reject(number, "lone surrogate", str(error))
