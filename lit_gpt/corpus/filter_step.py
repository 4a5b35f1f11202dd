"""The stages repetition and quality: documents that break a limit are removed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from datatrove.pipeline.base import PipelineStep

from lit_gpt.corpus.draft import Draft, in_batches
from lit_gpt.corpus.measures import DUPLICATE, TOP, Batch
from lit_gpt.corpus.settings import FilterSettings
from lit_gpt.corpus.task import Task

STAGES = ("repetition", "quality")


class Limit(NamedTuple):
    stage: str
    measure: str
    threshold: float
    least: bool
    """Whether the threshold is the least value that is kept, and not the greatest."""
    drawn: float
    """Where the histogram ends."""

    @property
    def rule(self) -> str:
        return ("min_" if self.least else "max_") + self.measure

    def is_broken_by(self, value: float) -> bool:
        return value < self.threshold if self.least else value > self.threshold


def limits_of(settings: FilterSettings, stages: Sequence[str]) -> list[Limit]:
    """The limits of the stages, in their order."""
    repetition = [("duplicate_line_fraction", settings.max_duplicate_line_fraction)]
    repetition += [
        (f"top_{n}gram_fraction", value) for n, value in zip(TOP, settings.max_top_ngram_fractions, strict=True)
    ]
    repetition += [
        (f"duplicate_{n}gram_fraction", value)
        for n, value in zip(DUPLICATE, settings.max_duplicate_ngram_fractions, strict=True)
    ]
    found = [Limit("repetition", name, value, False, 1.0) for name, value in repetition if value is not None]
    quality = [
        ("words", settings.min_document_words, True, 2000),
        ("words", settings.max_document_words, False, 2000),
        ("mean_word_length", settings.min_mean_word_length, True, 20),
        ("mean_word_length", settings.max_mean_word_length, False, 20),
        ("hash_fraction", settings.max_hash_fraction, False, 0.3),
        ("ellipsis_fraction", settings.max_ellipsis_fraction, False, 0.3),
        ("bullet_line_fraction", settings.max_bullet_line_fraction, False, 1.0),
        ("ellipsis_line_fraction", settings.max_ellipsis_line_fraction, False, 1.0),
        ("alphabetic_word_fraction", settings.min_alphabetic_word_fraction, True, 1.0),
        ("stop_words", settings.min_stop_words, True, 20),
        ("newline_fraction", settings.max_newline_fraction, False, 0.5),
        ("duplicate_character_fraction", settings.max_duplicate_character_fraction, False, 1.0),
    ]
    found += [Limit("quality", name, value, least, end) for name, value, least, end in quality if value is not None]
    return [limit for stage in stages for limit in found if limit.stage == stage]


class FilterStep(PipelineStep):
    """Stages that follow each other, measured together; a document goes by the first limit that it breaks."""

    name = "filters"
    type = "filter"

    def __init__(self, settings: FilterSettings, stages: Sequence[str], task: Task) -> None:
        super().__init__()
        self._limits, self._stages, self._task = limits_of(settings, stages), stages, task
        self._stop_words = settings.stop_words

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Draft]:
        for drafts in in_batches(data):
            yield from self._filtered(drafts)

    def _filtered(self, drafts: list[Draft]) -> Iterator[Draft]:
        batch = Batch([draft.text for draft in drafts])
        values = batch.repetition() if "repetition" in self._stages else {}
        if "quality" in self._stages:
            values |= batch.quality(self._stop_words)
        drawn = {limit.measure: limit.drawn for limit in self._limits}
        for measure, end in drawn.items():
            self._task.measure(measure, values[measure], end)
        columns = [(limit, values[limit.measure].tolist()) for limit in self._limits]
        for number, draft in enumerate(drafts):
            for limit, column in columns:
                value = column[number]
                if limit.is_broken_by(value):
                    self._task.remove(draft, limit.stage, limit.rule, value, limit.threshold)
                    break
            else:
                yield draft
