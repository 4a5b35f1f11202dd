"""The two kinds of worker of a store build: one tokenises pieces of the input, the other writes planned shards.

Both run in worker_pool.py's processes, on one core each. store_builder.py states their costs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from lit_gpt.cli import BadInput
from lit_gpt.data.token_store import Shard, ShardWriter, Vocabulary, shard_name
from lit_gpt.data.tokenizer import Tokenizer
from lit_gpt.prepare.records import Document, Fields, Piece, parse_piece
from lit_gpt.prepare.shard_plan import ShardPlan, SplitRule
from lit_gpt.prepare.token_runs import (
    ID_BYTES,
    KEY,
    OFFSET,
    PLACE,
    TOKENS,
    Columns,
    RunSummary,
    TokenisedDocument,
    file_and_line,
    open_run,
    place,
    write_run,
)


class TokeniseSettings(NamedTuple):
    runs: Path
    tokenizer_path: str
    fingerprint: str
    source_names: Sequence[str]
    fields: Fields
    seed: int
    keep_order: bool
    add_bos: bool
    run_bytes: int
    attempt: int
    """Number of this start of the build: part of the runs' names, so that they are unique."""


class PieceReport(NamedTuple):
    lines: int
    tokens: int
    rejects: int
    source_bytes: int


class TokeniseWork:
    """Tokenises pieces, and writes a run whenever it has run_bytes of tokens and ids."""

    def __init__(self, settings: TokeniseSettings) -> None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core per worker: the pool is what runs in parallel
        self._settings = settings
        self._tokenizer = Tokenizer.from_folder(settings.tokenizer_path)
        if self._tokenizer.fingerprint != settings.fingerprint:
            raise BadInput(f"tokenizer folder {settings.tokenizer_path} changed during the build")
        self._dtype = vocabulary_of(self._tokenizer).dtype
        self._runs_written = 0
        self._clear()

    def _clear(self) -> None:
        self._documents: list[TokenisedDocument] = []
        self._bytes = 0
        self._summary = RunSummary([], 0, 0, 0, 0, [])

    def __call__(self, piece: Piece) -> PieceReport:
        records = list(parse_piece(piece, self._settings.fields))
        documents = [record for record in records if isinstance(record, Document)]
        encoded = self._tokenizer.encode_batch([document.text for document in documents])
        tokenised = [self._tokenised(piece.file, *pair) for pair in zip(documents, encoded, strict=True)]
        rejects = [
            (piece.file, record.line, record.kind, record.detail)
            for record in records
            if not isinstance(record, Document)
        ]
        tokens = sum(len(document.ids) for document in tokenised)
        self._documents += tokenised
        self._bytes += sum(document.ids.nbytes + len(document.id) for document in tokenised)
        summary = self._summary
        summary.pieces.append((piece.file, piece.number))
        summary.rejects.extend(rejects)
        self._summary = summary._replace(
            lines=summary.lines + len(records),
            documents=summary.documents + len(documents),
            tokens=summary.tokens + tokens,
            source_bytes=summary.source_bytes + piece.source_bytes,
        )
        if self._bytes >= self._settings.run_bytes:
            self._write_run()
        return PieceReport(len(records), tokens, len(rejects), piece.source_bytes)

    def _tokenised(self, file: int, document: Document, ids: list[int]) -> TokenisedDocument:
        settings, tokenizer = self._settings, self._tokenizer
        begin = [tokenizer.bos_id] if settings.add_bos else []
        array = np.array([*begin, *ids, tokenizer.eos_id], self._dtype)
        name = (document.id or f"{settings.source_names[file]}:{document.line}").encode()
        id_hash = xxhash.xxh3_128_intdigest(name, seed=settings.seed)
        where = place(file, document.line)
        content = xxhash.xxh3_64_intdigest(document.text_bytes, seed=settings.seed)
        key = where if settings.keep_order else id_hash >> 64
        return TokenisedDocument(key, where, content, id_hash, name, array, len(document.text_bytes))

    def _write_run(self) -> None:
        name = f"{self._settings.attempt:04d}-{os.getpid()}-{self._runs_written:06d}"
        write_run(self._settings.runs, name, self._documents, self._summary)
        self._runs_written += 1
        self._clear()

    def finish(self) -> None:
        """Write the last run."""
        if self._summary.pieces:
            self._write_run()


class ShardWork:
    """Gathers a planned shard's documents from all runs and writes the shard into its split's folder."""

    def __init__(
        self,
        runs: Sequence[Path],
        destination: Path,
        vocabulary: Vocabulary,
        source_names: Sequence[str],
        rule: SplitRule,
    ) -> None:
        self._runs = [open_run(path) for path in runs]
        self._destination = destination
        self._vocabulary = vocabulary
        self._source_names = source_names
        self._rule = rule

    def __call__(self, plan: ShardPlan) -> tuple[ShardPlan, Shard]:
        records: list[bytes] = []
        tables = []
        for run in self._runs:
            table = self._select(run.documents, plan)
            records += read_records(run.data, table, self._vocabulary.dtype.itemsize)
            tables.append(table)
        table = np.concatenate(tables, axis=1)
        writer = ShardWriter(self._destination / plan.split, shard_name(plan.number), self._vocabulary)
        for column in np.lexsort((table[PLACE], table[KEY])).tolist():
            record, id_bytes = records[column], int(table[ID_BYTES, column])
            file, line = file_and_line(int(table[PLACE, column]))
            ids = np.frombuffer(record, self._vocabulary.dtype, offset=id_bytes)
            writer.add(ids, record[:id_bytes].decode(), self._source_names[file], line)
        shard = writer.close()
        if (shard.documents, shard.tokens) != (plan.documents, plan.tokens):
            raise RuntimeError(f"shard {shard} is not as planned: {plan}")
        return plan, shard

    def _select(self, documents: Columns, plan: ShardPlan) -> Columns:
        low = np.searchsorted(documents[KEY], np.uint64(plan.first[0]), side="left")
        high = np.searchsorted(documents[KEY], np.uint64(plan.last[0]), side="right")
        table = np.array(documents[:, low:high])
        key, where = table[KEY], table[PLACE]
        after_first = (key > np.uint64(plan.first[0])) | (where >= np.uint64(plan.first[1]))
        before_last = (key < np.uint64(plan.last[0])) | (where <= np.uint64(plan.last[1]))
        return table[:, self._rule.selects(plan.split, table) & after_first & before_last]

    def finish(self) -> None:
        """Nothing is kept between shards."""


def read_records(path: Path, table: Columns, token_bytes: int) -> Iterator[bytes]:
    """Each column's record (id, then token ids), one read for records that are neighbours on disk."""
    offsets = table[OFFSET].astype(np.int64)
    sizes = (table[ID_BYTES] + table[TOKENS] * np.uint64(token_bytes)).astype(np.int64)
    breaks = np.flatnonzero(offsets[1:] != offsets[:-1] + sizes[:-1]) + 1
    with open(path, "rb", buffering=0) as file:
        for group in np.split(np.arange(len(offsets)), breaks):
            if not len(group):
                continue
            start = int(offsets[group[0]])
            file.seek(start)
            data = _read_exactly(file, int(sizes[group].sum()))
            for column in group:
                begin = int(offsets[column]) - start
                yield data[begin : begin + int(sizes[column])]


def _read_exactly(file: Any, count: int) -> bytes:
    parts = []
    while count:
        part = file.read(count)
        if not part:
            raise RuntimeError(f"{file.name} is shorter than its index says")
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def vocabulary_of(tokenizer: Tokenizer) -> Vocabulary:
    return Vocabulary(tokenizer.fingerprint, tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id)
