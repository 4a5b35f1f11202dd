"""Builds a token store from documents, in three steps. A build that was killed continues where it was.

1. Workers parse and tokenise pieces of the input and write runs, sorted by the documents' final order: a keyed hash of
   the id, or the input's order.
2. The plan merges the runs' indexes: documents whose id occurs earlier are rejected, a keyed hash of the text decides
   between train and val, and consecutive documents are cut into shards.
3. Workers gather each shard's documents from all runs and write it. The manifests come last.

Invariants: the bytes of train/ and val/ depend on what build_request.py names, never on the number of workers, the run
size or a kill; lines of input = documents + rejects; equal texts are in one split.
Costs: until the end, disk for the tokens twice and 100 bytes per document. Memory per worker is twice run_bytes in step
1, and twice a shard in step 3, which makes up to runs x shards small reads. One process reads and decompresses for all
workers: 0.3 GB/s of gzip feeds about 60. A kill costs what was tokenised since the last run.
"""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lit_gpt.cli import NO_ROOM, BadInput
from lit_gpt.data.library_faults import one_line
from lit_gpt.data.token_store import Shard, Vocabulary, write_manifest
from lit_gpt.data.tokenizer import Tokenizer
from lit_gpt.files import discard, publish, sweep
from lit_gpt.prepare.build_ledger import Ledger, length_statistics, make_ledger, write_rejects
from lit_gpt.prepare.build_request import REJECTS, SUMMARY, WORK, BuildSettings, claim, find_finished, make_request
from lit_gpt.prepare.build_workers import PieceReport, ShardWork, TokeniseSettings, TokeniseWork, vocabulary_of
from lit_gpt.prepare.document_source import read_pieces
from lit_gpt.prepare.records import DAMAGE, Piece, SourceFile
from lit_gpt.prepare.reject_guard import CHECK_LINES, RejectGuard, refuse_damage
from lit_gpt.prepare.shard_plan import SplitPlan, SplitRule, plan_shards, split_threshold
from lit_gpt.prepare.source_files import open_sources
from lit_gpt.prepare.token_runs import Columns, RunSummary, duplicate_places, find_runs, open_run
from lit_gpt.prepare.worker_pool import run_pool

SWEPT = "build.done"
"""The work folder's name while it is deleted."""

log = logging.getLogger(__name__)


class BuildProgress(NamedTuple):
    """How far a build is."""

    stage: str
    done: int
    total: int
    """`done` of `total`: bytes of the sources while tokenising, tokens while writing."""
    tokens: int
    rejects: int


Report = Callable[[BuildProgress], None]


@dataclass
class Totals:
    """Totals over the tokenised pieces."""

    lines: int = 0
    tokens: int = 0
    rejects: int = 0
    source_bytes: int = 0
    stopped: bool = False
    """Reading ended early because of too many rejects."""

    def add(self, report: PieceReport) -> None:
        self.lines += report.lines
        self.tokens += report.tokens
        self.rejects += report.rejects
        self.source_bytes += report.source_bytes


def build(settings: BuildSettings, report: Report) -> dict[str, Any]:
    """Build what `settings` ask for, continue that build, or find it finished; returns the content of summary.json.

    Raises BadInput if sources, tokenizer or destination do not allow it, or if too many lines are rejected.
    """
    destination = Path(settings.destination_path)
    tokenizer = Tokenizer.from_folder(settings.tokenizer_path)
    with one_line(f"tokenizer folder {settings.tokenizer_path}"):
        tokenizer.require_lossless()
    if settings.add_bos and tokenizer.bos_id is None:
        raise BadInput(f"--add_bos: tokenizer folder {settings.tokenizer_path} names no bos_token")
    sources = open_sources(
        settings.source,
        settings.fields,
        outside=destination,
        max_repeated_ids=settings.max_reject_fraction,
        allow_damaged_files=settings.allow_damaged_files,
    )
    request = make_request(settings, sources, tokenizer.fingerprint)
    if (destination / SWEPT).is_dir() and os.access(destination, os.W_OK):
        discard(destination / SWEPT)
    if (finished := find_finished(destination, request)) is not None:
        lost = {kind: count for kind, count in finished["ledger"]["rejects"].items() if kind in DAMAGE}
        if lost and not settings.allow_damaged_files:
            raise BadInput(
                f"{destination} holds this data set, made with --allow_damaged_files: {sum(lost.values())} rejects in "
                f"{destination / REJECTS} stand for what could not be read. Give the flag again, or fetch the files "
                "again and choose another --destination_path"
            )
        log.info("%s already holds this data set, finished", destination)
        return finished
    lock = claim(destination, request)
    try:
        return _Build(settings, sources, vocabulary_of(tokenizer), request, report).run()
    finally:
        lock.close()
        discard(destination / SWEPT)  # only now, since NFS keeps the names of open files


class _Build:
    """One start of a build; all that must outlive a kill is in DIR/build."""

    def __init__(
        self,
        settings: BuildSettings,
        sources: list[SourceFile],
        vocabulary: Vocabulary,
        request: dict[str, Any],
        report: Report,
    ) -> None:
        self.settings = settings
        self.sources = sources
        self.vocabulary = vocabulary
        self.request = request
        self._report = report
        self._last = BuildProgress("tokenise", 0, sum(source.bytes for source in sources), 0, 0)
        self.destination = Path(settings.destination_path)
        self.folder = self.destination / WORK

    def report(self, progress: BuildProgress) -> None:
        self._last = progress
        self._report(progress)

    def run(self) -> dict[str, Any]:
        """Raises OSError that says how many bytes are needed where no room is left."""
        try:
            return self._run()
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            raise OSError(
                error.errno,
                f"{error.strerror}. Until the end about {self._needed_bytes():,} more bytes are needed. What is done "
                "is kept: make room, and give the same command again",
                error.filename or str(self.destination),
            ) from error

    def _needed_bytes(self) -> int:
        """An estimate of what is still to be written: runs, then the shards."""
        last, token_bytes = self._last, self.vocabulary.dtype.itemsize
        if last.stage == "write":
            return token_bytes * (last.total - last.done)
        if not last.done:
            return last.total  # text of 4 bytes a token, whose id has 2, twice
        return token_bytes * (2 * last.tokens * last.total // last.done - last.tokens)

    def _run(self) -> dict[str, Any]:
        found = self._find_runs()
        self._refuse_damage(found)
        while not self._is_tokenised(found):
            self._tokenise(found)
            found = self._find_runs()
        runs = [open_run(path) for path in found]
        duplicates = duplicate_places(runs)
        ledger = self._ledger(found, duplicates)
        if not ledger.documents:
            self.folder.rename(self.destination / SWEPT)
            raise BadInput(f"the source holds no document: {', '.join(self.settings.source)}")
        threshold = split_threshold(runs, duplicates[0], self.settings.val_fraction)
        if self.settings.val_fraction and not threshold:
            log.warning("no validation data: there is only one document, or all have the same text")
        rule = SplitRule(threshold, duplicates[0])
        plans = plan_shards(runs, rule, self.settings.shard_tokens)
        shards = self._write_shards(found, plans, rule)
        splits = {split: self._finish(plans[split], shards[split]) for split in ("val", "train") if shards[split]}
        counts = {"lines": ledger.lines, "documents": ledger.documents, "rejects": ledger.kinds}
        summary = {"request": self.request, "ledger": counts, "splits": splits}
        publish(self.destination / SUMMARY, [json.dumps(summary, indent=1, ensure_ascii=False).encode()])
        self.folder.rename(self.destination / SWEPT)
        return summary

    def _refuse_damage(self, runs: dict[Path, RunSummary]) -> None:
        """Raise BadInput for what an earlier start with --allow_damaged_files left out, unless this one may too."""
        if not self.settings.allow_damaged_files:
            for summary in runs.values():
                for file, line, kind, detail in summary.rejects:
                    refuse_damage(self.sources[file], line, kind, detail)

    def _find_runs(self) -> dict[Path, RunSummary]:
        """The runs so far. A killed start's worker may add one until its next task, so each step looks once."""
        return find_runs(self.folder / "runs")

    def _piece_counts(self) -> dict[int, int]:
        """Number of pieces of each file that was read to its end."""
        counts = {file: 1 for file, source in enumerate(self.sources) if source.format == "text"}
        names = (path for path in (self.folder / "pieces").iterdir() if path.name.isdigit())  # NFS may add .nfs names
        return {**counts, **{int(path.name): int(path.read_text()) for path in names}}

    def _is_tokenised(self, runs: dict[Path, RunSummary]) -> bool:
        done = Counter(file for summary in runs.values() for file, _ in summary.pieces)
        counts = self._piece_counts()
        return all(done[file] == counts.get(file) for file in range(len(self.sources)))

    def _tokenise(self, runs: dict[Path, RunSummary]) -> None:
        settings = self.settings
        work = TokeniseSettings(
            runs=self.folder / "runs",
            tokenizer_path=settings.tokenizer_path,
            fingerprint=self.vocabulary.fingerprint,
            source_names=[source.name for source in self.sources],
            fields=settings.fields,
            seed=settings.seed,
            keep_order=settings.keep_order,
            add_bos=settings.add_bos,
            run_bytes=settings.run_bytes,
            attempt=1 + max((int(path.name.split("-")[0]) for path in runs), default=0),
        )
        totals = Totals()
        for summary in runs.values():
            totals.add(PieceReport(summary.lines, summary.tokens, len(summary.rejects), summary.source_bytes))
        total = sum(source.bytes for source in self.sources)
        pieces = self._pieces({(file, number) for summary in runs.values() for file, number in summary.pieces}, totals)
        self.report(BuildProgress("tokenise", totals.source_bytes, total, totals.tokens, totals.rejects))
        for result in run_pool(settings.workers, TokeniseWork, (work,), pieces):
            if result is not None:
                totals.add(result)
                self.report(BuildProgress("tokenise", totals.source_bytes, total, totals.tokens, totals.rejects))
        if totals.stopped:
            self._ledger(self._find_runs(), np.zeros((2, 0), np.uint64))

    def _pieces(self, done: set[tuple[int, int]], totals: Totals) -> Iterator[Piece]:
        """The pieces that are in no run yet; files that are done are not read again."""
        counts = self._piece_counts()
        guard = RejectGuard(self.settings.max_reject_fraction, self.settings.allow_damaged_files)
        for file, source in enumerate(self.sources):
            if file in counts and all((file, number) in done for number in range(counts[file])):
                continue
            read = 0
            for piece in read_pieces(source, file, self.settings.fields):
                read += 1
                guard.admit(source, piece)
                if totals.lines >= CHECK_LINES and totals.rejects > self.settings.max_reject_fraction * totals.lines:
                    totals.stopped = True
                    return
                if (file, piece.number) not in done:
                    yield piece
            if source.format != "text":
                publish(self.folder / "pieces" / str(file), [str(read).encode()])

    def _ledger(self, runs: dict[Path, RunSummary], duplicates: Columns) -> Ledger:
        """The ledger of `runs`, with its rejects written to rejects.jsonl; BadInput if there are too many."""
        ledger = make_ledger(runs.values(), duplicates, [source.name for source in self.sources])
        listing = self.destination / REJECTS
        write_rejects(listing, ledger.rejects)
        ledger.check(self.settings.max_reject_fraction, listing)
        return ledger

    def _write_shards(
        self, runs: dict[Path, RunSummary], plans: dict[str, SplitPlan], rule: SplitRule
    ) -> dict[str, list[Shard]]:
        """Write the planned shards, except those that an earlier start has written; returns each split's."""
        for split, plan in plans.items():
            if plan.shards:
                (self.destination / split).mkdir(exist_ok=True)
        planned = [shard for plan in plans.values() for shard in plan.shards]
        shards = self._written_shards()
        tasks = [shard for shard in planned if (shard.split, shard.number) not in shards]
        arguments = (
            list(runs),
            self.destination,
            self.vocabulary,
            [source.name for source in self.sources],
            rule,
        )
        total = sum(shard.tokens for shard in planned)
        done = sum(shard.tokens for shard in shards.values())
        self.report(BuildProgress("write", done, total, done, 0))
        for result in run_pool(min(self.settings.workers, len(tasks)), ShardWork, arguments, tasks):
            if result is not None:
                plan, shard = result
                shards[plan.split, plan.number] = shard
                record = self.folder / "shards" / f"{plan.split}-{plan.number}.json"
                publish(record, [json.dumps(shard._asdict()).encode()])
                done += shard.tokens
                self.report(BuildProgress("write", done, total, done, 0))
        return {split: [shards[split, shard.number] for shard in plan.shards] for split, plan in plans.items()}

    def _written_shards(self) -> dict[tuple[str, int], Shard]:
        shards = {}
        for path in (self.folder / "shards").glob("*.json"):
            split, number = path.stem.split("-")
            shards[split, int(number)] = Shard(**json.loads(path.read_bytes()))
        return shards

    def _finish(self, plan: SplitPlan, shards: list[Shard]) -> dict[str, Any]:
        """Publish the manifest of one split; returns its part of the summary."""
        folder = self.destination / plan.split
        sweep(folder, alone=True)
        names = ("seed", "val_fraction", "shard_tokens", "keep_order", "add_bos")
        store = write_manifest(
            folder,
            shards,
            self.vocabulary,
            split=plan.split,
            text_bytes=plan.text_bytes,
            settings={name: self.request[name] for name in names},
        )
        return {
            "dataset_id": store.dataset_id,
            "shards": len(shards),
            "documents": store.documents,
            "tokens": store.tokens,
            "text_bytes": store.text_bytes,
            "bytes_per_token": round(store.text_bytes / store.tokens, 4),
            "document_tokens": length_statistics(plan.lengths),
        }
