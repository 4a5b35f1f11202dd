"""Whether a corpus is what its ledger says: hashes, and every source document against its output, byte for byte."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from operator import itemgetter
from typing import Any, NamedTuple

import pyarrow.parquet as pq

from lit_gpt.corpus.corpus import Corpus
from lit_gpt.corpus.draft import Mask, apply_edits, line_starts
from lit_gpt.corpus.parts import Part
from lit_gpt.files import OWN_JSON_BYTES, read_json, xxh3
from lit_gpt.prepare.document_source import read_documents, read_pieces
from lit_gpt.prepare.records import Document, Fields, SourceFile, parse_piece
from lit_gpt.prepare.reject_guard import RejectGuard

_MOST = 20


class Checked(NamedTuple):
    documents: int
    rows: int
    faults: list[str]


def verify(corpus: Corpus) -> Checked:
    """Read all of it and its sources again. At most _MOST faults are named."""
    faults = _Faults()
    _check_files(corpus, faults)
    documents = rows = kept = 0
    for part in corpus.parts:
        if not faults.names:  # what a damaged file holds is no news
            counts = _check_part(corpus, part, faults)
            documents, rows, kept = documents + counts[0], rows + counts[1], kept + counts[2]
    if not faults.names:
        stats = read_json(corpus.layout.root / "stats.json", OWN_JSON_BYTES)
        for name, counted in (("documents", documents), ("kept_documents", kept)):
            if stats[name] != counted:
                faults.add(f"stats.json says {stats[name]} {name}; there are {counted}")
        took = sum(rule[kind] for rule in stats["rules"] for kind in ("documents", "paragraphs", "masks"))
        if took != rows:
            faults.add(f"stats.json counts {took} rows of the ledger; there are {rows}")
    return Checked(documents, rows, faults.names)


class _Faults:
    def __init__(self) -> None:
        self.names: list[str] = []

    def add(self, fault: str) -> None:
        if len(self.names) < _MOST:
            self.names.append(fault)


def _check_files(corpus: Corpus, faults: _Faults) -> None:
    root = corpus.layout.root
    for name, known in corpus.files.items():
        path = root / name
        if not path.is_file():
            faults.add(f"{path} is missing")
        elif path.stat().st_size != known["bytes"] or xxh3(path) != known["xxh3"]:
            faults.add(f"{path} is not the file that the manifest names")
    for folder in ("documents", "removed", "ids"):
        for path in sorted((root / folder).iterdir()):
            if f"{folder}/{path.name}" not in corpus.files:
                faults.add(f"{path} is not in the manifest")
    for source in corpus.sources:
        if not source.path.is_file():
            faults.add(f"source {source.path} is missing")
        elif source.path.stat().st_size != source.bytes:
            faults.add(f"source {source.path} has {source.path.stat().st_size} bytes; it had {source.bytes}")


def _check_part(corpus: Corpus, part: Part, faults: _Faults) -> tuple[int, int, int]:
    """Documents, rows of the ledger and documents kept of a part."""
    ledger = _ledger(corpus, part)
    output = _output(corpus, part)
    held = next(ledger, None)
    documents = rows = kept = 0
    for file, document in _documents(part, corpus.fields):
        documents += 1
        name = corpus.sources[file].name
        where = f"{name} line {document.line}"
        own: list[dict[str, Any]] = []
        if held is not None and held[0] == (name, document.line):
            own, held = held[1], next(ledger, None)
        rows += len(own)
        id = document.id or f"{name}:{document.line}"
        if any(row["document_id"] != id for row in own):
            faults.add(f"{where}: the ledger names another id than {id}")
        expected = _expected(document.text, own, where, faults)
        if expected is None:
            continue
        kept += 1
        found = next(output, None)
        if found is None or found.id != id or found.text != expected:
            faults.add(f"{where}: document {id} is not its source less what the ledger names")
            return documents, rows, kept
    if held is not None:
        faults.add(f"the ledger of part {part.number} names {held[0][0]} line {held[0][1]}, which is no document")
    if next(output, None) is not None:
        faults.add(f"{corpus.layout.documents(part.number)} holds more documents than the sources give")
    return documents, rows, kept


def _expected(text: str, rows: list[dict[str, Any]], where: str, faults: _Faults) -> str | None:
    """The document's text in the corpus; None if it is not there."""
    lines, starts = text.split("\n"), line_starts(text)
    if rows and rows[0]["paragraph"] is None:
        if rows[0]["length_bytes"] != len(text.encode()):
            faults.add(f"{where}: the ledger gives another length")
        return None
    gone: set[int] = set()
    masks: dict[int, list[Mask]] = {}
    for row in rows:
        number, start, length = row["paragraph"], row["start_byte"], row["length_bytes"]
        if number >= len(lines):
            faults.add(f"{where}: the ledger names paragraph {number} of {len(lines)}")
        elif row["replacement"] is not None:
            masks.setdefault(number, []).append(Mask(start, length, row["replacement"]))
        elif number in gone or (start, length) != (starts[number], len(lines[number].encode())):
            faults.add(f"{where}: the ledger's place of paragraph {number} is wrong")
        else:
            gone.add(number)
    kept = set(range(len(lines))) - gone
    return apply_edits(text, kept, {number: those for number, those in masks.items() if number in kept})


def _documents(part: Part, fields: Fields) -> Iterator[tuple[int, Document]]:
    for file, source in enumerate(part.sources, part.first_file):
        for piece in read_pieces(source, file, fields):
            for record in parse_piece(piece, fields):
                if isinstance(record, Document):
                    yield file, record


def _output(corpus: Corpus, part: Part) -> Iterator[Document]:
    path = corpus.layout.documents(part.number)
    if not path.exists():
        return iter(())
    source = SourceFile(path, path.name, path.stat().st_size, 0, "jsonl", ".zst", None)
    return read_documents([source], Fields(), RejectGuard(0, False))


def _ledger(corpus: Corpus, part: Part) -> Iterator[tuple[tuple[str, int], list[dict[str, Any]]]]:
    """File and line of each document of the part's ledger, with its rows."""
    with open(corpus.layout.removed(part.number), "rb") as raw:
        rows = (row for batch in pq.ParquetFile(raw).iter_batches(1 << 12) for row in batch.to_pylist())
        for key, own in groupby(rows, key=itemgetter("source_file", "line")):
            yield key, list(own)
