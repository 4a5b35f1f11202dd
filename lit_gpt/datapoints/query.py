"""Questions about what a run saw: which documents a step trained on, which steps trained on a document, and whether
data and log still agree.

Answers come from replaying the log through the order; no answer is stored.
Invariants: each attempt is replayed with its own slot facts, and only on data sets with the recorded ids.
Costs: a step or a document takes a binary search in the log and a few mapped pages of the document index; `verify`
reads every row again (some 200 M tokens/s).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lit_gpt.cli import BadInput
from lit_gpt.data.order import ORDER_VERSION, POOL_SHARDS, Ints
from lit_gpt.data.packing import PACKING_VERSION
from lit_gpt.data.row_reader import RowReader, SourceRows
from lit_gpt.data.token_store import DamagedShard, ShardFile, TokenStore
from lit_gpt.datapoints.attempts import Attempt
from lit_gpt.datapoints.document_index import DocumentIndex, Location
from lit_gpt.datapoints.log import FOLDER
from lit_gpt.datapoints.run_record import RunRecord, StepRecord
from lit_gpt.datapoints.witness import Witness, contradictions


class Seen(NamedTuple):
    """A part of a document, in a row of a step."""

    step: int
    slot: int
    rank: int
    row: int
    """Row within the step, over all ranks."""
    epoch: int
    document: str
    start: int
    """Its first token, within the document."""
    length: int
    """Tokens, as the row's inputs."""
    source: int
    """Number of the data set, in the order of the settings."""
    shard: int
    token: int
    """Its first token, within the shard."""


class Source(NamedTuple):
    """What an attempt's slots stand for."""

    reader: RowReader
    indexes: Sequence[DocumentIndex]
    world_size: int
    micro_batch_size: int

    def rank(self, row: int) -> int:
        """The rank that trained on a row (numbered within the step)."""
        return row // self.micro_batch_size % self.world_size


class Replay:
    """A run's record and its data. `data_dirs` says where the data is now, if it has moved.

    Raises BadInput if the run has no log, or if the data is not what an attempt read.
    """

    def __init__(self, run_dir: Path, data_dirs: Sequence[Path] = (), index_dir: Path | None = None) -> None:
        self._log_dir = run_dir / FOLDER
        self.record = RunRecord(self._log_dir)
        self._data_dirs = data_dirs
        self._index_dir = index_dir or run_dir / FOLDER / "documents"
        self._readers: dict[str, tuple[RowReader, list[DocumentIndex]]] = {}
        self._sources: dict[int, Source] = {}

    def source(self, number: int) -> Source:
        """The data as attempt `number` read it."""
        if number not in self._sources:
            attempt = self.record.attempts[number]
            key = json.dumps(dict(attempt.facts), sort_keys=True)
            if key not in self._readers:
                reader = self._open(attempt)
                self._readers[key] = reader, [DocumentIndex(self._index_dir, store) for store in reader.stores]
            details = attempt.details
            self._sources[number] = Source(*self._readers[key], details["world_size"], details["micro_batch_size"])
        return self._sources[number]

    def _open(self, attempt: Attempt) -> RowReader:
        facts = attempt.facts
        ours = {"order_version": ORDER_VERSION, "packing_version": PACKING_VERSION, "pool_shards": POOL_SHARDS}
        for name, value in ours.items():
            if facts[name] != value:
                raise BadInput(f"attempt {attempt.attempt} has {name} {facts[name]}, this program replays {value} only")
        named = attempt.details["train_data_dir"]
        paths = self._data_dirs or map(Path, [named] if isinstance(named, str) else named)
        stores = [TokenStore.open(path) for path in paths]
        found = [store.dataset_id for store in stores]
        if found != facts["datasets"]:
            where = ", ".join(str(store.path) for store in stores)
            logged = facts["datasets"]
            raise BadInput(f"{where} is not the data of attempt {attempt.attempt}: id {found}, logged {logged}")
        return RowReader(
            stores, facts["block_size"], facts["seed"], weights=facts["mixture"], packing=facts["packing"],
            index_dir=self._index_dir / "packing",
            cross_document_attention=facts.get("cross_document_attention", False),
        )  # fmt: skip

    def step(self, number: int) -> list[Seen]:
        """All parts of documents that step `number` saw, in order of slot; BadInput if there is no such step."""
        record = self.record.step(number)
        if record is None:
            last = max((record.step for record in self.record.steps()), default=0)
            raise BadInput(f"step {number} is not in the log, which goes from step 1 to step {last}")
        return self.seen_in(record)

    def seen_in(self, record: StepRecord) -> list[Seen]:
        source = self.source(record.attempt)
        slots = record.first_slot + np.arange(record.rows)
        located = source.reader.locate(slots)
        found: list[Seen] = []
        for number, shard in sorted(set(zip(located.source.tolist(), located.shard.tolist(), strict=True))):
            rows = np.flatnonzero((located.source == number) & (located.shard == shard))
            found += self._parts(source, record, located, rows, number, shard)
        return sorted(found, key=lambda seen: seen.slot)

    def _parts(
        self, source: Source, record: StepRecord, located: SourceRows, rows: Ints, number: int, shard: int
    ) -> Iterator[Seen]:
        """What those rows of the step that lie in one shard hold."""
        documents = source.indexes[number].shard(shard)
        spans = source.reader.shards.packing(number, shard).spans(located.row[rows])
        first = np.searchsorted(documents.ends, spans.start, side="right")
        last = np.searchsorted(documents.ends, spans.start + spans.inputs, side="left")
        for within, start, inputs, one, other in zip(
            spans.row.tolist(), spans.start.tolist(), spans.inputs.tolist(), first.tolist(), last.tolist(), strict=True
        ):
            row = int(rows[within])
            for document in range(one, other + 1):
                begin = documents.begin(document)
                start_here = max(start, begin)
                length = min(start + inputs, int(documents.ends[document])) - start_here
                yield Seen(
                    record.step, record.first_slot + row, source.rank(row), row, int(located.epoch[row]),
                    documents.ids[document].as_py(), start_here - begin, length, number, shard, start_here,
                )  # fmt: skip

    def document(self, document_id: str) -> list[Seen]:
        """All parts of a document that the run has seen, in order of slot; BadInput if there is no such document."""
        found: list[Seen] = []
        known = False
        attempts = [segment.attempt.attempt for segment in self.record.lineage]
        by_reader = {id(self.source(number).reader): self.source(number) for number in attempts}
        for reader, indexes, *_ in by_reader.values():
            for number, index in enumerate(indexes):
                if location := index.find(document_id):
                    known = True
                    found += self._visits(reader, number, location, document_id)
        if not known:
            raise BadInput(f"no document {document_id!r} in the data of the run")
        return sorted(found, key=lambda seen: (seen.step, seen.slot, seen.start))

    def _visits(self, reader: RowReader, number: int, location: Location, document_id: str) -> Iterator[Seen]:
        spans = reader.shards.packing(number, location.shard).rows_between(location.begin, location.end)
        visits = [(start, e) for start in self.record.data_starts() for e in range(self._epochs(reader, number, start))]
        for data_from_step, epoch in visits:
            own = reader.orders[number].slot_of(epoch, location.shard, spans.row)
            slots = reader.mixture.slot_of(number, own)
            for slot, start, length in zip(slots.tolist(), spans.start.tolist(), spans.inputs.tolist(), strict=True):
                record = self.record.step_of(slot, data_from_step)
                if record is None or self.source(record.attempt).reader is not reader:
                    continue
                row = slot - record.first_slot
                rank = self.source(record.attempt).rank(row)
                within = start - location.begin
                yield Seen(
                    record.step, slot, rank, row, epoch, document_id, within, length, number, location.shard, start
                )  # fmt: skip

    def _epochs(self, reader: RowReader, number: int, data_from_step: int) -> int:
        """Number of epochs of a source that the run has begun since that start of data."""
        slots = self.record.consumed(data_from_step)
        return -(-reader.mixture.consumed(slots)[number] // reader.orders[number].rows_per_epoch)

    def tokens(self, seen: Seen) -> list[int]:
        """The part's token ids, read from its shard."""
        record = self.record.step(seen.step)
        if record is None:
            raise ValueError(f"step {seen.step} is not of this run")
        store = self.source(record.attempt).reader.stores[seen.source]
        with ShardFile(store.path, store.shards[seen.shard], store) as file:
            ids: list[int] = file.read(seen.token, seen.token + seen.length).tolist()
        return ids

    def verify(self, witnesses: Sequence[Witness] = ()) -> Iterator[str]:
        """One line for each contradiction within the log, between log and data, or between log and `witnesses`.

        Data that cannot be read is told once, with the first step that needs it.
        """
        yield from contradictions(self._log_dir, self.record.attempts, witnesses)
        before: StepRecord | None = None
        begun = self.record.lineage[0]
        excused = {line["step"] for line in self.record.deviations() if line["deviation"] != "left_out"}
        jumps = {(step, first_slot): first_slot + rows for step, first_slot, rows in self.record.left_out()}
        unreadable = set[str]()
        for record in self.record.steps():
            step = before.step + 1 if before else begun.after + 1
            slot = before.first_slot + before.rows if before else record.first_slot if begun.attempt.parent else 0
            if before and self._began(before) != self._began(record):
                slot = 0
            slot = jumps.get((record.step, slot), slot)
            missing = set(range(step, record.step)) - excused
            if missing:
                yield f"step {min(missing)} is missing: the log goes from step {step - 1} to step {record.step}"
            elif record.first_slot != slot and not excused & set(range(step, record.step + 1)):
                yield f"step {record.step} begins at row {record.first_slot}, the step before it ended at row {slot}"
            before = record
            try:
                digest, targets = self._replayed(record)
            except DamagedShard as error:
                if str(error) not in unreadable:
                    unreadable.add(str(error))
                    yield f"step {record.step} and maybe later ones cannot be compared; damaged: {error}"
                continue
            if (digest, targets) != (record.digest, record.targets):
                yield (
                    f"step {record.step}: digest {digest:016x} of {targets} targets, logged {record.digest:016x} of "
                    f"{record.targets}; {self._explain(record)}"
                )

    def _began(self, record: StepRecord) -> int:
        return self.record.attempts[record.attempt].data_from_step

    def _replayed(self, record: StepRecord) -> tuple[int, int]:
        reader = self.source(record.attempt).reader
        tokens = np.empty((record.rows, reader.block_size), reader.dtype)
        targets = np.empty(tokens.shape, np.int32)
        filled = reader.fill(record.first_slot + np.arange(record.rows), tokens, targets)
        return filled.digest, int(np.count_nonzero(targets >= 0))

    def _explain(self, record: StepRecord) -> str:
        """Why a step's replay differs: a damaged shard, or whole shards of other data."""
        reader = self.source(record.attempt).reader
        located = reader.locate(record.first_slot + np.arange(record.rows))
        for number, shard in sorted(set(zip(located.source.tolist(), located.shard.tolist(), strict=True))):
            store = reader.stores[number]
            try:
                with ShardFile(store.path, store.shards[shard], store) as file:
                    file.verify()
            except DamagedShard as error:
                return f"damaged: {error}"
        return "its shards are whole: the run read other data, or in another order"


class Difference(NamedTuple):
    """Where two runs diverge."""

    step: int | None
    """First step that only one has, or in which they saw different rows; None where all steps agree."""
    common_steps: int
    this: StepRecord | None
    other: StepRecord | None


def difference(this: RunRecord, other: RunRecord) -> Difference:
    """Compare the rows that two runs trained on, step by step."""
    common = 0
    for one, two in zip_longest(this.steps(), other.steps()):
        if one is None or two is None or one[:3] + one[4:5] != two[:3] + two[4:5]:
            return Difference(min(record.step for record in (one, two) if record), common, one, two)
        common += 1
    return Difference(None, common, None, None)
