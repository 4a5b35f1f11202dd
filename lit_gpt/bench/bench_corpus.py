"""Paragraph deduplication of build_corpus beside datatrove's own and a plain program, from .jsonl.zst to .jsonl.zst;
filters and MinHash; answers of `why` from a large ledger.

The text is made of a vocabulary of German words; a share of the paragraphs are copies. Times of builds are seconds of
the CPU, of this process and its children, so other programs on the machine matter little.
"""

from __future__ import annotations

import json
import os
import random
import resource
import time
import unicodedata
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import xxhash

from lit_gpt.corpus.corpus import Corpus
from lit_gpt.corpus.corpus_builder import build
from lit_gpt.corpus.draft import LINE_BITS
from lit_gpt.corpus.finish import FORMAT, MANIFEST
from lit_gpt.corpus.last_steps import id_hash
from lit_gpt.corpus.ledger import ROWS, write_ledger
from lit_gpt.corpus.minhash import SpaceTokenizer, shingle_hash
from lit_gpt.corpus.parts import Layout
from lit_gpt.corpus.settings import CorpusSettings
from lit_gpt.corpus.why import explain
from lit_gpt.files import write_json

COPIES = 0.3
"""Share of the paragraphs that are copies."""
FILE_BYTES = 25_000_000
"""Of text, of a source file."""
PART_BYTES = 32 << 20
"""Of source files as stored, so that parts are as large whatever the size of all."""
LEDGER_PARTS = 8
ROWS_A_DOCUMENT = 2
ASKED = 200
_VOCABULARY, _POOL = 50_000, 20_000


class Speed(NamedTuple):
    what: str
    gb_per_core_hour: float
    """Of text."""
    cpu_s: float
    peak_bytes: int
    """Largest memory of the process."""


def make_text(folder: Path, megabytes: int, seed: int = 0) -> int:
    """Write documents, a file for each FILE_BYTES; returns the bytes of their texts."""
    folder.mkdir(parents=True)
    paragraphs, choice = _Paragraphs(seed), random.Random(seed)
    pool = [next(paragraphs) for _ in range(_POOL)]
    written = number = 0
    files = max(1, megabytes * 1_000_000 // FILE_BYTES)
    for file in range(files):
        goal = megabytes * 1_000_000 * (file + 1) // files
        with pa.CompressedOutputStream(str(folder / f"{file:03d}.jsonl.zst"), "zstd") as out:
            while written < goal:
                lines = choice.randint(3, 20)
                text = "\n".join(
                    choice.choice(pool) if choice.random() < COPIES else next(paragraphs) for _ in range(lines)
                )
                out.write((json.dumps({"id": f"d{number}", "text": text}, ensure_ascii=False) + "\n").encode())
                number, written = number + 1, written + len(text.encode())
    return written


class _Paragraphs(Iterator[str]):
    """Paragraphs of some 200 bytes that all differ: words by Zipf's law, made of the letters of German."""

    def __init__(self, seed: int) -> None:
        choice, letters = random.Random(seed), "eeeeennniiissrraattdhulcgmobwfkzüpvöäßj"
        self._words = ["".join(choice.choices(letters, k=choice.randint(2, 11))) for _ in range(_VOCABULARY)]
        self._shares = np.cumsum(1 / (np.arange(_VOCABULARY) + 10))
        self._generator, self._number = np.random.default_rng(seed), 0
        self._drawn: list[str] = []

    def __next__(self) -> str:
        if len(self._drawn) < 64:
            ranks = self._generator.random(1 << 16) * self._shares[-1]
            self._drawn = [self._words[at] for at in np.searchsorted(self._shares, ranks).tolist()]
        length = 5 + self._number * 7919 % 50
        words = self._drawn[-length:]
        del self._drawn[-length:]
        self._number += 1
        return f"{self._number} {' '.join(words)}."


def cpu_s() -> float:
    """Seconds of the CPU that this process and its children that have ended took."""
    spent = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in spent)


def measure(what: str, text_bytes: int, run: Callable[[], Any]) -> Speed:
    begin_s = cpu_s()
    run()
    spent_s = cpu_s() - begin_s
    return Speed(what, text_bytes / 1e9 / (spent_s / 3600), spent_s, peak_memory_bytes())


def ours(source: Path, out: Path, stages: list[str], tokenizer_path: str | None = None, **settings: Any) -> None:
    values = {"stages": stages, "workers": 1, "part_bytes": PART_BYTES, **settings}
    made = CorpusSettings(source=[str(source)], destination_path=str(out), tokenizer_path=tokenizer_path, **values)
    made.check()
    build(made, lambda progress: None)


def datatroves(source: Path, out: Path) -> None:
    """SentenceDedup with n_sentences 1 on lines, without its normalisation; one task a file, one process."""
    from datatrove.executor.local import LocalPipelineExecutor
    from datatrove.pipeline.dedup import SentDedupConfig, SentenceDedupFilter, SentenceDedupSignature
    from datatrove.pipeline.dedup import SentenceFindDedups as Find
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.writers.jsonl import JsonlWriter
    from datatrove.utils.text import TextNormConfig
    from loguru import logger

    logger.disable("datatrove")
    words = SpaceTokenizer()  # quicker than spaCy, which it takes for German
    plain = TextNormConfig(lowercase=False, remove_punctuation=False, norm_unicode_diacritics=False, norm_numbers=False)
    config = SentDedupConfig(
        n_sentences=1, split_sentences=False, min_doc_words=20, min_num_sentences=0, norm_config=plain
    )
    signatures, duplicates = str(out / "signatures"), str(out / "duplicates")

    def run(name: str, pipeline: list[Any], tasks: int) -> None:
        executor = LocalPipelineExecutor(pipeline, tasks, 1, logging_dir=str(out / name))
        for rank in range(tasks):
            deepcopy(executor)._run_for_rank(rank, 1)

    reader, files = JsonlReader(str(source), compression="zstd"), len(list(source.iterdir()))
    sign = SentenceDedupSignature(signatures, config=config, language=words)
    sign.hash_fc = shingle_hash
    run("1", [reader, sign], files)
    run("2", [Find(signatures, duplicates, config=config)], 1)
    writer = JsonlWriter(str(out / "documents"), compression="zstd")
    run("3", [reader, SentenceDedupFilter(duplicates, config, language=words), writer], files)


def plain(source: Path, out: Path) -> None:
    """The shortest program that does it on one core: a set of all keys, in memory; nothing recorded."""
    out.mkdir()
    seen: set[bytes] = set()
    for path in sorted(source.iterdir()):
        with pa.CompressedOutputStream(str(out / path.name), "zstd") as output:
            for record in _records(path):
                kept = []
                for line in record["text"].split("\n"):
                    key = xxhash.xxh3_128_digest(" ".join(unicodedata.normalize("NFC", line).split()).encode())
                    if key not in seen or len(line.split()) < 4:
                        seen.add(key)
                        kept.append(line)
                output.write((json.dumps({**record, "text": "\n".join(kept)}, ensure_ascii=False) + "\n").encode())


def make_ledger(folder: Path, rows: int) -> int:
    """Write a corpus that is a ledger of about so many rows, and its index of ids; returns its documents."""
    layout, documents = Layout(folder), rows // ROWS_A_DOCUMENT // LEDGER_PARTS
    for name in ("removed", "ids"):
        (folder / name).mkdir(parents=True)
    sources = [[f"/none/{part}.jsonl", f"{part}.jsonl", 1, 0, "jsonl", ""] for part in range(LEDGER_PARTS)]
    for part in range(LEDGER_PARTS):
        lines = np.arange(1, documents + 1)
        ids = [f"doc-{part * documents + line - 1}" for line in lines.tolist()]
        hashes = np.array([id_hash(id) for id in ids], np.uint64)
        table = np.stack([hashes, (part << LINE_BITS | lines).astype(np.uint64)])
        np.save(layout.ids(part), table[:, np.lexsort(table[::-1])])
        count, each = documents * ROWS_A_DOCUMENT, lines.repeat(ROWS_A_DOCUMENT)
        values: dict[str, Any] = {
            "file": np.full(count, part), "document_id": np.repeat(ids, ROWS_A_DOCUMENT), "line": each,
            "source_file": [f"{part}.jsonl"] * count, "stage": ["paragraph_dedup"] * count,
            "rule": ["repeated_paragraph"] * count, "value": np.full(count, 2.0), "threshold": np.ones(count),
            "paragraph": np.tile(np.arange(ROWS_A_DOCUMENT), documents), "start_byte": each * 7 % 4096,
            "length_bytes": each * 3 % 512, "duplicate_of_document": np.repeat(ids, ROWS_A_DOCUMENT),
            "duplicate_of_paragraph": np.zeros(count, np.int32), "replacement": [None] * count,
        }  # fmt: skip
        columns = [pa.array(values[field.name], field.type) for field in ROWS]
        write_ledger(layout.removed(part), [pa.table(columns, ROWS)])
    settings = {"part_bytes": 1, "text_field": "text", "id_field": "id"}
    write_json(
        folder / MANIFEST, {"format": FORMAT, "request": {"sources": sources, "settings": settings}, "files": {}}
    )
    return documents * LEDGER_PARTS


def ask(folder: Path, documents: int) -> list[tuple[float, float]]:
    """Seconds, and those of the CPU, that `why` takes, in process and with the corpus opened each time, for ASKED
    documents; the first pays for what is set up once."""
    choice, taken = random.Random(0), []
    for _ in range(ASKED):
        wanted = f"doc-{choice.randrange(documents)}"
        begin_s, begin_cpu_s = time.perf_counter(), time.process_time()
        (found,) = explain(Corpus(folder), wanted)
        taken.append((time.perf_counter() - begin_s, time.process_time() - begin_cpu_s))
        assert len(found.rows) == ROWS_A_DOCUMENT
    return taken


def _records(path: Path) -> Iterator[dict[str, Any]]:
    with pa.CompressedInputStream(str(path), "zstd") as stream:
        rest = b""
        while block := stream.read(1 << 20):
            *lines, rest = (rest + block).split(b"\n")
            yield from map(json.loads, lines)


def peak_memory_bytes() -> int:
    """Of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if os.uname().sysname == "Darwin" else 1024)
