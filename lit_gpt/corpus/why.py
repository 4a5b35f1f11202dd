"""What was cut from a document, and why; or why all of it."""

from __future__ import annotations

from typing import Any, NamedTuple

from lit_gpt.cli import BadInput
from lit_gpt.corpus.corpus import Corpus
from lit_gpt.prepare.document_source import read_pieces
from lit_gpt.prepare.records import Document, parse_piece


class Explanation(NamedTuple):
    """What the ledger says of one document."""

    document_id: str
    source_file: str
    line: int
    file: int
    kept: bool
    rows: list[dict[str, Any]]


def explain(corpus: Corpus, id: str) -> list[Explanation]:
    """For each document with that id, in the order of the sources, what became of it; reads the ledger only, in some
    20 ms. Raises BadInput if there is none."""
    found = []
    for file, line in sorted(corpus.places(id)):
        rows = corpus.rows(file, line)
        if all(row["document_id"] == id for row in rows):
            kept = not any(row["paragraph"] is None for row in rows)
            found.append(Explanation(id, corpus.sources[file].name, line, file, kept, rows))
    if not found:
        raise BadInput(f"no document {id!r} was read for {corpus.layout.root}")
    return found


def source_record(corpus: Corpus, explanation: Explanation) -> Document | None:
    """The document in its source, read from the file's beginning; None if the file is not what it was."""
    source = corpus.sources[explanation.file]
    if not source.path.is_file() or source.path.stat().st_size != source.bytes:
        return None
    for piece in read_pieces(source, explanation.file, corpus.fields):
        for record in parse_piece(piece, corpus.fields):
            if isinstance(record, Document) and record.line == explanation.line:
                return record
    return None


def origin(record: Document) -> str:
    """Where a document comes from, as far as its record says: its source, its web address."""
    others = record.others or {}
    return ", ".join(str(others[name]) for name in ("source", "url") if others.get(name))


def removed_text(row: dict[str, Any], text: str) -> str:
    """The stretch of the source text that a row names."""
    begin = row["start_byte"]
    return text.encode()[begin : begin + row["length_bytes"]].decode()


def because(row: dict[str, Any]) -> str:
    """A row's rule, value and threshold in words."""
    said = f"{row['stage']}, {row['rule']}"
    if row["stage"] == "decontaminate":
        return f"{said}: {int(row['value'])} n-grams of evaluations, the first in {row['duplicate_of_document']}"
    if row["duplicate_of_document"] is not None:
        copies = f", {int(row['value'])} copies in all" if row["value"] is not None else ""
        paragraph = row["duplicate_of_paragraph"]
        of = f"paragraph {paragraph} of " if paragraph is not None else ""
        return f"{said}: repeats {of}{row['duplicate_of_document']}{copies}"
    if row["replacement"] is not None:
        return f"{said}: masked by {row['replacement']}"
    if row["value"] is None:
        return said
    return f"{said}: {row['value']:.6g}, limit {row['threshold']:.6g}"
