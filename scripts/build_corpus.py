"""Build a corpus from raw text: filters, paragraph deduplication, masking, and a ledger of every removal.

Reads JSON, CSV, text, Parquet and Arrow files, and folders of them (docs/data.md). Writes documents/ (the input of
prepare_data.py), removed/ (the ledger), stats.json and, last, MANIFEST.json (docs/corpus.md). After a kill at any
moment, the same command continues. The number of workers does not change the bytes.

    build_corpus.py plan --source ...       core-hours, tasks, memory and disk that a build will take, from a sample
    build_corpus.py why ID --corpus DIR     what was cut from a document and why
    build_corpus.py verify DIR              every source document is its output plus its rows of the ledger

With --executor slurm, called on a login node, the work is done by job arrays (docs/corpus.md).

Settings: defaults < YAML files (--config, such as pretrain/configs/corpus_german_web.yaml) < flags.

Example: python scripts/build_corpus.py --source raw/ --tokenizer_path tokenizer --destination_path corpus --workers 16
"""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from textwrap import shorten
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's lit_gpt, installed or not

from lit_gpt.cli import EXIT_FAILURE, Parser, command_line, run_program
from lit_gpt.corpus.settings import COMMON, CorpusSettings
from lit_gpt.settings_reader import parse_settings

CONFIGS = Path(__file__).resolve().parents[1] / "pretrain/configs"
LOG_INTERVAL_S = 10
SHOWN_CHARACTERS = 200

log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int | None:
    arguments = list(sys.argv[1:] if argv is None else argv)
    others = {"why": why, "verify": verify, "plan": plan, "slurm-step": slurm_step, "slurm-task": slurm_task}
    if arguments[:1] and arguments[0] in others:
        return others[arguments[0]](arguments[1:])
    recipes = sorted(CONFIGS.glob("corpus_*.yaml"))
    settings, _ = parse_settings(CorpusSettings, arguments, __doc__, common=COMMON, recipes=recipes)
    settings.check()
    from lit_gpt.corpus.corpus_builder import build  # imports datatrove, for which --help need not wait

    finish(settings, build(settings, Meter().show))
    return None


def finish(settings: CorpusSettings, stats: dict[str, Any] | None) -> None:
    """Say what there is now, and what to do next."""
    if stats is None:
        log.info("the same command tells how far it is; what the jobs say: %s/logs", settings.destination_path)
        return
    print(describe(stats, str(settings.destination_path)))
    if stats["kept_documents"] and settings.tokenizer_path:
        words = ["--source", f"{settings.destination_path}/documents", "--tokenizer_path", settings.tokenizer_path]
        log.info("next: %s", command_line("scripts/prepare_data.py", *words, "--destination_path", "data"))


def slurm_step(argv: Sequence[str]) -> None:
    """What a job between two arrays runs (lit_gpt/corpus/slurm.py)."""
    from lit_gpt.corpus.corpus_builder import build
    from lit_gpt.corpus.slurm import step_settings

    settings = step_settings(Path(argv[0]))
    finish(settings, build(settings, Meter().show, is_step=True))


def slurm_task(argv: Sequence[str]) -> None:
    """What an element of an array runs."""
    from lit_gpt.corpus.corpus_builder import run_element

    run_element(Path(argv[1]), argv[0])


def plan(argv: Sequence[str]) -> None:
    """Say what a build with these settings will take, from builds of samples of its sources."""
    recipes = sorted(CONFIGS.glob("corpus_*.yaml"))
    settings, _ = parse_settings(CorpusSettings, argv, plan.__doc__, common=COMMON, recipes=recipes)
    dataclasses.replace(settings, destination_path=settings.destination_path or "corpus").check()
    from lit_gpt.corpus.plan import plan as planned

    logging.getLogger("lit_gpt.corpus").setLevel(logging.WARNING)  # builds of samples are no news
    found = planned(settings)
    workers = settings.workers or found.tasks
    print(
        f"sources: {found.files:,} files, {found.stored_bytes / 1e9:,.3g} GB as stored, some "
        f"{found.text_bytes / 1e9:,.3g} GB of text, {found.documents:,.0f} documents\n"
        f"work: {found.passes} passes over the sources, {found.tasks:,} tasks each\n"
        f"time: {found.core_hours:,.3g} core-hours; {found.core_hours / min(workers, found.tasks):,.3g} hours with "
        f"{min(workers, found.tasks):,} workers\n"
        f"memory: {found.worker_bytes / 1e9:.2g} GB a worker\n"
        f"disk: {found.build_bytes / 1e9:,.3g} GB until the end, {found.corpus_bytes / 1e9:,.3g} GB for the corpus\n"
        f"kept: at most {found.kept_fraction:.1%} of the text (of the sample; repeats are rarer there)"
    )


def why(argv: Sequence[str]) -> None:
    """Print what was cut from a document and why."""
    parser = Parser("What was cut from a document of the sources, and why; or why all of it.")
    parser.prog += " why"
    parser.add_argument("id", help="id of the document")
    parser.add_argument("--corpus", type=Path, required=True, help="folder of the corpus")
    parser.add_argument("--json", action="store_true", help="print a JSON object for each document with that id")
    arguments = parser.parse_args(argv)
    from lit_gpt.corpus.corpus import Corpus
    from lit_gpt.corpus.why import because, explain, origin, removed_text, source_record

    corpus = Corpus(arguments.corpus)
    for found in explain(corpus, arguments.id):
        record = source_record(corpus, found)
        text = record and record.text
        rows = [{**row, "text": None if text is None else removed_text(row, text)} for row in found.rows]
        if arguments.json:
            print(json.dumps({**found._asdict(), "rows": rows, "others": record and record.others}, ensure_ascii=False))
            continue
        fate = "kept" if found.kept else "removed"
        print(f"{found.document_id}: {fate} ({found.source_file} line {found.line}), {len(rows)} rows of the ledger")
        if record is not None and origin(record):
            print(f"  from {origin(record)}")
        for row in rows:
            where = "all of it" if row["paragraph"] is None else f"paragraph {row['paragraph']}"
            print(f"  {where}: {because(row)}")
            if row["text"] is not None:
                print(f"    | {shorten(row['text'], SHOWN_CHARACTERS, placeholder=' ...')}")
        if text is None and rows:
            print("  (the source is gone or has changed: its text cannot be shown)")


def verify(argv: Sequence[str]) -> int:
    """Check a corpus against its ledger and its sources; returns the exit code."""
    parser = Parser("Check that every document of the sources is its text in the corpus plus its rows of the ledger.")
    parser.prog += " verify"
    parser.add_argument("folder", type=Path, help="folder of the corpus")
    folder = parser.parse_args(argv).folder
    from lit_gpt.corpus.corpus import Corpus
    from lit_gpt.corpus.verify import verify as check

    checked = check(Corpus(folder))
    for fault in checked.faults:
        print(f"wrong: {fault}")
    if not checked.faults:
        print(f"{folder}: {checked.documents:,} documents and {checked.rows:,} rows of the ledger checked; whole")
    return EXIT_FAILURE if checked.faults else 0


class Meter:
    """A log line with speed and time left every LOG_INTERVAL_S; work of earlier attempts does not count."""

    def __init__(self) -> None:
        self._first: dict[str, tuple[float, int]] = {}
        self._last_s: dict[str, float] = {}
        self._over: set[str] = set()

    def show(self, progress: Any) -> None:
        now_s = time.monotonic()
        begin_s, begin = self._first.setdefault(progress.stage, (now_s, progress.done))
        last_s = self._last_s.setdefault(progress.stage, now_s)
        over = progress.done >= progress.total
        if progress.stage in self._over or (not over and now_s - last_s < LOG_INTERVAL_S):
            return
        if over:
            self._over.add(progress.stage)
        self._last_s[progress.stage] = now_s
        spent_s = max(now_s - begin_s, 1e-9)
        left_s = spent_s * (progress.total - progress.done) / max(progress.done - begin, 1)
        log.info(
            "%s: %.0f %%, %.3f GB/s of sources as stored, %s left", progress.stage,
            100 * progress.done / max(progress.total, 1), (progress.done - begin) / 1e9 / spent_s,
            timedelta(seconds=int(left_s)),
        )  # fmt: skip


def describe(stats: dict[str, Any], destination: str) -> str:
    """stats.json in a few lines."""
    rejects = ", ".join(f"{count} {kind}" for kind, count in stats["rejects"].items()) or "none"
    lines = [f"{stats['lines']:,} lines in, {stats['documents']:,} documents; rejected: {rejects}"]
    for rule in stats["rules"]:
        took = ", ".join(f"{rule[kind]:,} {kind}" for kind in ("documents", "paragraphs", "masks") if rule[kind])
        lines.append(f"  {rule['stage']}: {rule['rule']}: {took} ({rule['bytes']:,} bytes)")
    share = stats["kept_text_bytes"] / max(stats["text_bytes"], 1)
    lines.append(
        f"{destination}/documents: {stats['kept_documents']:,} documents, {stats['kept_text_bytes']:,} bytes of text "
        f"({share:.1%})"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    run_program(main)
