"""The stages of a recipe as passes over the documents, and the jobs that they are made of.

A pass reads the sources, brings each document to where the passes before left it, and runs stages until one that must
know all documents: paragraph_dedup, minhash, or a limit of token_to_word that is a quantile (which can wait until such
a stage, as it changes no text). What the passes hand on is the ledger so far and a few bytes a document: the text is
never stored between them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from lit_gpt.corpus.decontamination import DecontaminateStep
from lit_gpt.corpus.filter_step import STAGES as FILTERS
from lit_gpt.corpus.filter_step import FilterStep
from lit_gpt.corpus.finish import FinishStep
from lit_gpt.corpus.last_steps import FinishPartStep, HandOnStep, IndexStep, WriteStep
from lit_gpt.corpus.masking import MaskStep
from lit_gpt.corpus.minhash import BucketStep, ClusterStep, SignatureStep
from lit_gpt.corpus.paragraph_fates import SettleStep
from lit_gpt.corpus.paragraph_groups import GroupStep
from lit_gpt.corpus.paragraph_keys import SignStep
from lit_gpt.corpus.parts import Layout, Part
from lit_gpt.corpus.ratio import RatioStep
from lit_gpt.corpus.ratio_fates import SettleRatioStep
from lit_gpt.corpus.read_step import ReadStep, ReplayStep
from lit_gpt.corpus.review import ReviewStep
from lit_gpt.corpus.settings import CorpusSettings
from lit_gpt.corpus.signals import SignalStep
from lit_gpt.corpus.task import Task
from lit_gpt.prepare.records import Fields


class Pass(NamedTuple):
    number: int
    stages: list[str]
    needs_quantile: bool
    """Whether it measures the ratios for a limit that they themselves give."""
    is_last: bool


class Job(NamedTuple):
    name: str
    pipeline: list[Any]
    tasks: int
    reads: bool
    """Whether its tasks read the sources."""


def passes_of(settings: CorpusSettings) -> list[Pass]:
    found: list[Pass] = []
    stages: list[str] = []
    waits = False

    def end(*, is_last: bool = False) -> None:
        nonlocal stages, waits
        found.append(Pass(len(found), stages, waits, is_last))
        stages, waits = [], False

    for stage in settings.stages:
        if stage == "minhash" and waits:
            end()
        stages.append(stage)
        if stage == "token_to_word":
            waits = settings.max_token_to_word is None
        if stage in ("paragraph_dedup", "minhash"):
            end()
    if waits:
        end()
    end(is_last=True)
    return found


def jobs_of(settings: CorpusSettings, parts: Sequence[Part], fields: Fields, layout: Layout) -> list[Job]:
    """The jobs of a build, in order; each needs those before it."""
    jobs: list[Job] = []
    dedup = None
    passes = passes_of(settings)
    for one in passes:
        jobs.append(Job(f"pass-{one.number}", _pipeline(one, settings, parts, fields, layout), len(parts), True))
        quantile = settings.max_token_to_word_quantile if one.needs_quantile else None
        if one.stages[-1:] == ["paragraph_dedup"]:
            jobs.append(Job("group", [GroupStep(layout, len(parts))], len(parts), False))
            settle = SettleStep(layout, one.number, len(parts), settings, quantile)
            jobs.append(Job("settle", [settle], 1, False))
            dedup = one.number
        elif one.stages[-1:] == ["minhash"]:
            jobs.append(Job("match", [BucketStep(layout, settings)], settings.minhash_buckets, False))
            jobs.append(Job("cluster", [ClusterStep(layout, one.number, len(parts), settings)], 1, False))
        elif quantile is not None:
            settled = SettleRatioStep(layout, one.number, len(parts), quantile)
            jobs.append(Job(f"settle-{one.number}", [settled], 1, False))
    if dedup is not None:
        again = [job.name for job in jobs[[job.name for job in jobs].index("settle") :]]
        review = ReviewStep(layout, dedup, len(passes) - 1, len(parts), settings.keep_next_survivor, again)
        jobs.append(Job("review", [review], 1, False))
    return [*jobs, Job("finish", [FinishStep(layout, len(parts), settings.max_reject_fraction)], 1, False)]


def _pipeline(one: Pass, settings: CorpusSettings, parts: Sequence[Part], fields: Fields, layout: Layout) -> list[Any]:
    names = [source.name for part in parts for source in part.sources]
    task = Task(names)
    guard = (settings.max_reject_fraction, settings.allow_damaged_files)
    steps: list[Any] = [ReadStep(parts, fields, guard, layout, one.number, task)]
    if one.number == 0:
        steps.append(IndexStep(layout))
    else:
        steps.append(ReplayStep(layout, one.number, task))
    makers: dict[str, Callable[[], Any]] = {
        "quality_signals": lambda: SignalStep(settings, names, task),
        "token_to_word": lambda: RatioStep(settings, str(settings.tokenizer_path), task),
        "paragraph_dedup": lambda: SignStep(layout, settings.fold_case),
        "decontaminate": lambda: DecontaminateStep(layout.work, task),
        "pii": lambda: MaskStep(settings, task),
    }
    stages = [stage for stage in one.stages if stage != "minhash"]
    while stages:
        together = next((at for at, stage in enumerate(stages) if stage not in FILTERS), len(stages))
        if together:
            steps.append(FilterStep(settings, stages[:together], task))
            del stages[:together]
        else:
            steps.append(makers[stages.pop(0)]())
    if one.is_last:
        return [*steps, WriteStep(layout, names), FinishPartStep(layout, one.number, task)]
    steps.append(HandOnStep(layout, one.number, task))
    return [*steps, SignatureStep(layout, settings)] if one.stages[-1:] == ["minhash"] else steps
