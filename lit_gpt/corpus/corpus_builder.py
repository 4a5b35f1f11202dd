"""Builds a corpus: reads the sources in passes, and publishes documents, ledger and manifest. A build that was killed
continues where it was.

Invariants: the bytes of the corpus depend on what make_request names, never on workers, tasks, executor or a kill;
the manifest comes last.
Costs: a pass reads and parses all sources; until the end, 24 bytes of disk a paragraph and a few more a document.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lit_gpt.cli import NO_ROOM, BadInput
from lit_gpt.corpus.corpus import fields as corpus_fields
from lit_gpt.corpus.corpus import requested_sources
from lit_gpt.corpus.decontamination import Ngrams, make_ngrams, write_ngrams
from lit_gpt.corpus.executors import LocalExecutor
from lit_gpt.corpus.finish import MANIFEST, REJECTS, check_rejects
from lit_gpt.corpus.paragraph_groups import partitions
from lit_gpt.corpus.parts import Layout, divide
from lit_gpt.corpus.passes import Job, jobs_of, passes_of
from lit_gpt.corpus.read_step import bytes_read
from lit_gpt.corpus.review import AnotherRound
from lit_gpt.corpus.settings import CorpusSettings, ExecutorSettings
from lit_gpt.corpus.signals import signals_file
from lit_gpt.corpus.slurm import SlurmRoute, Submitted, ranks_of_element, step_settings
from lit_gpt.data.tokenizer import Tokenizer
from lit_gpt.files import OWN_JSON_BYTES, discard, read_json
from lit_gpt.locks import Lock
from lit_gpt.prepare.build_request import claim_folder, refuse_other
from lit_gpt.prepare.document_source import PIECES_VERSION
from lit_gpt.prepare.records import SourceFile
from lit_gpt.prepare.source_files import open_sources
from lit_gpt.prepare.worker_pool import usable_cores

BUILDER_VERSION = 2
"""Increased when the same request gives other bytes than before."""
SWEPT = "build.done"
POLL_S = 1.0
_FREE = (
    "source",
    "destination_path",
    "tokenizer_path",
    "evaluation_texts",
    "allow_damaged_files",
    "max_reject_fraction",
)
"""Settings that name files, of which the request has more than the name, and those that change no byte."""

log = logging.getLogger(__name__)


class CorpusProgress(NamedTuple):
    """How far a pass is, in bytes of the sources."""

    stage: str
    done: int
    total: int


Report = Callable[[CorpusProgress], None]


def make_request(
    settings: CorpusSettings, sources: list[SourceFile], evaluations: Ngrams | None = None
) -> dict[str, Any]:
    """Everything that the bytes of the corpus depend on, as JSON types."""
    free = {*_FREE, *(field.name for field in dataclasses.fields(ExecutorSettings))}
    values = {name: value for name, value in dataclasses.asdict(settings).items() if name not in free}
    used = "token_to_word" in settings.stages
    return {
        "builder": BUILDER_VERSION,
        "pieces": PIECES_VERSION,
        "tokenizer": Tokenizer.from_folder(str(settings.tokenizer_path)).fingerprint if used else None,
        "evaluations": evaluations.digest if evaluations else None,
        "signals": _signals_of(settings, sources),
        "settings": values,
        "sources": [
            [str(one.path.absolute()), one.name, one.bytes, one.mtime_ns, one.format, one.compression]
            for one in sources
        ],
    }


def _signals_of(settings: CorpusSettings, sources: Sequence[SourceFile]) -> list[list[int]] | None:
    """Sizes and times of the files of signals; raises BadInput if one is missing."""
    if settings.signals_path is None:
        return None
    paths = [signals_file(Path(settings.signals_path), source.name) for source in sources]
    for path in paths:
        if not path.is_file():
            raise BadInput(f"no file of signals {path}")
    return [[path.stat().st_size, path.stat().st_mtime_ns] for path in paths]


def build(settings: CorpusSettings, report: Report, *, is_step: bool = False) -> dict[str, Any] | None:
    """Build what `settings` ask for, continue that build, or find it finished; returns stats.json, or None if the rest
    is in Slurm's queue. is_step: this process is a step (slurm.py).
    Raises BadInput if sources, tokenizer or destination do not allow it, or if too many lines are
    rejected."""
    layout = Layout(Path(str(settings.destination_path)))
    fields = corpus_fields(settings.text_field, settings.id_field)
    sources = open_sources(
        settings.source, fields, outside=layout.root, allow_damaged_files=settings.allow_damaged_files
    )
    ngrams = used_ngrams(settings)
    request = make_request(settings, sources, ngrams)
    if (layout.root / SWEPT).is_dir() and os.access(layout.root, os.W_OK):
        discard(layout.root / SWEPT)
    if (layout.root / MANIFEST).exists() and not layout.work.exists():
        finished = read_json(layout.root / MANIFEST, OWN_JSON_BYTES)["request"]
        refuse_other(layout.root, "a finished corpus", layout.root, finished, request)
        log.info("%s already holds this corpus, finished", layout.root)
        return read_json(layout.root / "stats.json", OWN_JSON_BYTES)
    route = SlurmRoute(layout, settings)
    if (queued := route.waiting(is_step=is_step)) is not None:
        if settings.executor == "local":
            raise BadInput(f"{layout.root} is {queued}: wait for it, or scancel these jobs")
        if is_step:
            route.wait_for()
        log.info("%s is %s", layout.root, queued)
        return None
    lock = claim(layout, request, len(passes_of(settings)))
    try:
        if ngrams is not None:
            write_ngrams(layout.work, ngrams)
        if settings.executor == "slurm" and not is_step:
            log.info("%s is in Slurm's queue as %s", layout.root, route.start())
            return None
        run_jobs(layout, settings, sources, report, route if is_step else None)
        layout.work.rename(layout.root / SWEPT)
    except Submitted:
        return None
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        detail = f"{error.strerror}. What is done is kept: make room, and give the same command again"
        raise OSError(error.errno, detail, error.filename or str(layout.root)) from error
    finally:
        lock.close()
        discard(layout.root / SWEPT)
    return read_json(layout.root / "stats.json", OWN_JSON_BYTES)


def used_ngrams(settings: CorpusSettings) -> Ngrams | None:
    """What decontaminate looks for, if it is a stage."""
    if "decontaminate" not in settings.stages:
        return None
    return make_ngrams(settings.evaluation_texts, settings.decontamination_ngrams)


def claim(layout: Layout, request: dict[str, Any], passes: int) -> Lock:
    """Make or find the folders of a build. Raises as claim_folder does, and BadInput before a new build if there is a
    document or a piece of a ledger: the corpus would hold it, too."""
    folders = [layout.work / "progress", layout.work / "dedup"]
    folders += [layout.work / f"pass-{number}" for number in range(passes)]
    results = [layout.root / name for name in ("documents", "removed", "ids")]
    folders += results
    found = next((path for folder in results for path in sorted(folder.glob("[!.]*"))), None)
    if found is not None and not (layout.work / "request.json").exists():
        raise BadInput(
            f"--destination_path {layout.root} holds {found.relative_to(layout.root)}, which is not of this build: "
            f"choose another folder, or delete {layout.root}"
        )
    return claim_folder(layout.root, folders, (REJECTS, "stats.json", "report.html", MANIFEST), request)


def run_jobs(
    layout: Layout, settings: CorpusSettings, sources: Sequence[SourceFile], report: Report,
    route: SlurmRoute | None = None,
) -> None:  # fmt: skip
    """Run the jobs of a build that are not done, in a folder that `claim` made."""
    parts = divide(sources, settings.part_bytes)
    jobs = jobs_of(settings, parts, corpus_fields(settings.text_field, settings.id_field), layout)
    total = sum(source.bytes for source in sources)
    while not _is_over(jobs, layout, settings, total, len(parts), report, route):
        pass


def _is_over(
    jobs: list[Job], layout: Layout, settings: CorpusSettings, total: int, parts: int, report: Report,
    route: SlurmRoute | None,
) -> bool:  # fmt: skip
    """Run the jobs that are not done; False if one of them asks for another round."""
    for job in jobs:
        executor = executor_of(job, layout, parts, 1 if route else settings.workers or usable_cores())
        if route is not None and (job.reads or executor.tasks > 1):
            route.run(job.name, executor)
        if not job.reads:
            try:
                executor.run()
            except AnotherRound:
                return False
            continue
        number = int(job.name.removeprefix("pass-"))
        with _Watch(layout, number, job.name, total, report):
            executor.run()
        if number == 0:
            check_rejects(layout, parts, settings.max_reject_fraction)
    return True


def executor_of(job: Job, layout: Layout, parts: int, workers: int) -> LocalExecutor:
    tasks = min(job.tasks, partitions(layout, parts)) if job.name == "group" else job.tasks
    return LocalExecutor(job.pipeline, tasks, workers, logging_dir=str(layout.logs(job.name)))


def run_element(folder: Path, name: str) -> None:
    """Run the tasks of the array's element that this process is (slurm.py)."""
    settings, layout = step_settings(folder), Layout(folder)
    parts = divide(requested_sources(read_json(layout.work / "request.json", OWN_JSON_BYTES)), settings.part_bytes)
    fields = corpus_fields(settings.text_field, settings.id_field)
    (job,) = [one for one in jobs_of(settings, parts, fields, layout) if one.name == name]
    executor_of(job, layout, len(parts), 1).run_ranks(ranks_of_element(layout, name))


class _Watch:
    """Reports how far the tasks of a pass are, from a thread, until the pass ends."""

    def __init__(self, layout: Layout, number: int, name: str, total: int, report: Report) -> None:
        self._layout, self._number, self._name, self._total, self._report = layout, number, name, total, report
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, name="progress", daemon=True)

    def _look(self) -> None:
        while not self._ended.wait(POLL_S):
            self._tell()

    def _tell(self) -> None:
        done = bytes_read(self._layout, self._number)
        self._report(CorpusProgress(self._name, min(done, self._total), self._total))

    def __enter__(self) -> None:
        self._tell()
        self._thread.start()

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._thread.join()
        self._tell()
