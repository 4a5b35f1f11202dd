"""Read documents: the one reader of every program that takes files of text.

A file is read once, in order, in pieces of about a MiB that any process can parse. The pieces depend on the file and
the names of its fields alone, so (file, piece) names the same records at every start.
Invariants: as of records.py. What cannot be read is a reject too (records.DAMAGE), and an error unless it was allowed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lit_gpt.cli import BadInput
from lit_gpt.prepare.csv_reader import csv_pieces
from lit_gpt.prepare.line_reader import json_pieces, line_pieces, text_pieces
from lit_gpt.prepare.records import Document, Fields, Piece, SourceFile, parse_piece
from lit_gpt.prepare.reject_guard import RejectGuard
from lit_gpt.prepare.streams import opened
from lit_gpt.prepare.table_reader import table_pieces

PIECES_VERSION = 2
"""Increased when a file is cut into other pieces than before: a build that is under way cannot go on then."""


def read_pieces(source: SourceFile, file: int, fields: Fields) -> Iterator[Piece]:
    """The pieces of `source`, numbered from 0; `file` is the source's number.

    Raises BadInput if the file cannot be opened as what its name says, OSError if the disk fails.
    """
    try:
        if source.format in ("parquet", "arrow"):
            yield from table_pieces(source, file, fields)
            return
        with opened(source) as stream:
            if source.format == "text":
                yield from text_pieces(stream, file)
            elif source.format == "json":
                yield from json_pieces(stream, file)
            elif source.format == "csv":
                yield from csv_pieces(stream, file, fields)
            else:
                yield from line_pieces(stream, file)
    except BadInput as error:
        raise BadInput(f"{source.path} {error}") from None
    except OSError as error:  # of a read, which names no file
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror or str(error), str(source.path)) from error


def read_documents(sources: Sequence[SourceFile], fields: Fields, guard: RejectGuard) -> Iterator[Document]:
    """The documents of all sources, in order. Raises BadInput as read_pieces and `guard` do."""
    for number, source in enumerate(sources):
        for piece in read_pieces(source, number, fields):
            guard.admit(source, piece)
            for record in parse_piece(piece, fields):
                guard.count(source, record)
                if isinstance(record, Document):
                    yield record
    guard.check()
