"""What a build will take: core-hours, tasks, memory and disk, from builds of two samples of its sources.

The samples are the beginnings of files that lie evenly among all. What one takes more than the other, for each byte
more, is taken for all bytes. Repeats between documents are rarer in a sample, so less is kept in the end than said.
Costs: about twice the time for SAMPLE_BYTES of text.
"""

from __future__ import annotations

import dataclasses
import json
import resource
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from lit_gpt.cli import BadInput
from lit_gpt.corpus.corpus import fields as corpus_fields
from lit_gpt.corpus.corpus_builder import claim, make_request, run_jobs, used_ngrams
from lit_gpt.corpus.decontamination import write_ngrams
from lit_gpt.corpus.paragraph_groups import KEY_BYTES, number_of_partitions
from lit_gpt.corpus.parts import Layout, divide
from lit_gpt.corpus.passes import passes_of
from lit_gpt.corpus.settings import CorpusSettings
from lit_gpt.prepare.document_source import read_pieces
from lit_gpt.prepare.records import Document, Fields, SourceFile, parse_piece
from lit_gpt.prepare.source_files import open_sources

SAMPLE_BYTES = 24_000_000
"""Of text."""
SAMPLE_FILES = 16
BASE_BYTES = 300_000_000
"""Memory of a worker that holds nothing: Python, numpy, pyarrow, datatrove, tables of characters."""
PARAGRAPH_BYTES = 110
"""Memory for each paragraph of a part, while its keys are sorted."""
DOCUMENT_BYTES = 1.5
"""Memory of the one task that settles paragraphs, for each document of all."""


class Plan(NamedTuple):
    files: int
    stored_bytes: int
    text_bytes: float
    documents: float
    passes: int
    tasks: int
    """Parts: tasks of each pass, files of the output."""
    core_hours: float
    worker_bytes: float
    """Largest memory of a process."""
    build_bytes: float
    """Disk for what the passes hand on, until the end."""
    corpus_bytes: float
    """Disk for documents/, removed/ and ids/."""
    kept_fraction: float
    """Of the sample's text."""


class _Sample(NamedTuple):
    stored_bytes: int
    text_bytes: int
    documents: int
    paragraphs: int


class _Taken(NamedTuple):
    cpu_s: float
    build_bytes: int
    corpus_bytes: int
    kept_fraction: float


def plan(settings: CorpusSettings) -> Plan:
    """Raises BadInput as build does."""
    fields = corpus_fields(settings.text_field, settings.id_field)
    outside = Path(str(settings.destination_path)) if settings.destination_path else None
    sources = open_sources(
        settings.source, fields, outside=outside, allow_damaged_files=settings.allow_damaged_files
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="corpus-plan-") as folder:
        root = Path(folder)
        for name in ("small", "large"):
            (root / name).mkdir()
        small = _write_sample(sources, fields, root / "small", SAMPLE_BYTES // 6)
        large = _write_sample(sources, fields, root / "large", SAMPLE_BYTES)
        if not large.documents:
            raise BadInput(f"no document at the beginning of {sources[0].path}, or of others")
        less, more = (_built(settings, root / name, root / f"{name}-corpus") for name in ("small", "large"))
    stored = sum(source.bytes for source in sources)
    scale = stored / large.stored_bytes
    further = large.text_bytes - small.text_bytes
    cpu_s = (more.cpu_s - less.cpu_s) / further * large.text_bytes if further else more.cpu_s
    parts = divide(sources, settings.part_bytes)
    largest = max(part.bytes for part in parts) * large.paragraphs / large.stored_bytes
    keys = large.paragraphs * scale / number_of_partitions(int(large.paragraphs * scale))
    memory = [largest * PARAGRAPH_BYTES, keys * KEY_BYTES + large.documents * scale * DOCUMENT_BYTES]
    return Plan(
        len(sources), stored, large.text_bytes * scale, large.documents * scale, len(passes_of(settings)), len(parts),
        max(cpu_s, 0.0) * scale / 3600, BASE_BYTES + max(memory), more.build_bytes * scale, more.corpus_bytes * scale,
        more.kept_fraction,
    )  # fmt: skip


def _write_sample(sources: Sequence[SourceFile], fields: Fields, folder: Path, size: int) -> _Sample:
    """Write some `size` bytes of text of the sources to a file in `folder`."""
    count = min(len(sources), SAMPLE_FILES)
    chosen = [number * len(sources) // count for number in range(count)]
    stored = text = documents = paragraphs = 0
    with pa.CompressedOutputStream(str(folder / "sample.jsonl.zst"), "zstd") as out:
        for at, number in enumerate(chosen, 1):
            for piece in read_pieces(sources[number], number, fields):
                if text >= size * at // count:
                    break
                stored += piece.source_bytes
                for record in parse_piece(piece, fields):
                    if isinstance(record, Document):
                        own = {"id": record.id or f"{number}:{record.line}", "text": record.text}
                        out.write(json.dumps({**(record.others or {}), **own}).encode() + b"\n")
                        text, documents = text + len(record.text_bytes), documents + 1
                        paragraphs += record.text.count("\n") + 1
    return _Sample(max(stored, 1), text, documents, paragraphs)


def _built(settings: CorpusSettings, source: Path, out: Path) -> _Taken:
    """Build the sample; what it took."""
    settings = dataclasses.replace(
        settings, source=[str(source)], destination_path=str(out), text_field="text", id_field="id", workers=1,
        executor="local",
    )  # fmt: skip
    layout, fields = Layout(out), corpus_fields("text", "id")
    begin_s = _cpu_s()
    ngrams = used_ngrams(settings)
    sources = open_sources(settings.source, fields)
    with claim(layout, make_request(settings, sources, ngrams), len(passes_of(settings))):
        if ngrams is not None:
            write_ngrams(layout.work, ngrams)
        run_jobs(layout, settings, sources, lambda progress: None)
    stats: dict[str, Any] = json.loads((out / "stats.json").read_bytes())
    corpus = sum(_size(out / name) for name in ("documents", "removed", "ids"))
    return _Taken(
        _cpu_s() - begin_s, _size(layout.work), corpus, stats["kept_text_bytes"] / max(stats["text_bytes"], 1)
    )


def _cpu_s() -> float:
    spent = resource.getrusage(resource.RUSAGE_SELF)
    return spent.ru_utime + spent.ru_stime


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
