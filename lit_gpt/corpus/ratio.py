"""The stage token_to_word: tokens for each word of a document, against a limit or a quantile of all documents.

The tokens are those of prepare_data (lit_gpt/data/tokenizer.py), without the end of document. Ratios are kept in units
of UNIT, so that a quantile is exact, and the same in any order.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from datatrove.pipeline.base import PipelineStep
from datatrove.utils.batching import batched

from lit_gpt.corpus.draft import Draft
from lit_gpt.corpus.line_words import count_words
from lit_gpt.corpus.parts import Layout
from lit_gpt.corpus.settings import RatioSettings
from lit_gpt.corpus.survivors import NOT_MEASURED, Survivors
from lit_gpt.corpus.task import Task

STAGE = "token_to_word"
UNIT = 0.001
MOST = 100_000
"""The largest ratio that is told from larger ones, in units; also that of a document without words."""
DRAWN = 6.0
_BATCH_DOCUMENTS = 64


class RatioStep(PipelineStep):
    """Measures the ratio, and removes what is beyond fixed limits."""

    name = STAGE
    type = "filter"

    def __init__(self, settings: RatioSettings, tokenizer_path: str, task: Task) -> None:
        super().__init__()
        self._settings, self._path, self._task = settings, tokenizer_path, task
        self._units: list[int] = []

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Draft]:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core for each task
        from lit_gpt.data.tokenizer import Tokenizer

        tokenizer = Tokenizer.from_folder(self._path)
        for drafts in batched(data, _BATCH_DOCUMENTS):
            tokens = tokenizer.encode_batch([draft.text for draft in drafts])
            for draft, ids in zip(drafts, tokens, strict=True):
                raw = draft.text.encode()
                words = count_words(raw)
                units = min(MOST, round(len(ids) / (UNIT * words))) if words else MOST
                self._units.append(units)
                self._task.counts["tokens"] += len(ids)
                self._task.counts["token_text_bytes"] += len(raw)
                draft.metadata["ratio"] = units
                if self._keeps(draft, units * UNIT):
                    yield draft
        values = np.array(self._units, np.int64)
        self._task.measure(STAGE, values * UNIT, DRAWN)
        self._task.ratios = np.bincount(values, minlength=MOST + 1)

    def _keeps(self, draft: Draft, value: float) -> bool:
        settings = self._settings
        for rule, bound, bad in (
            ("min_token_to_word", settings.min_token_to_word, lambda bound: value < bound),
            ("max_token_to_word", settings.max_token_to_word, lambda bound: value > bound),
        ):
            if bound is not None and bad(bound):
                self._task.remove(draft, STAGE, rule, value, bound)
                return False
        return True


class TooHigh(NamedTuple):
    threshold: float
    dropped: list[npt.NDArray[np.bool_]]
    """For each part: of the documents that reached the end of the pass, those above the threshold."""
    values: list[npt.NDArray[np.float64]]


def dropped_by_ratio(layout: Layout, number: int, parts: int, quantile: float) -> TooHigh:
    """The smallest ratio that the share `quantile` of the measured documents does not exceed, and who exceeds it."""
    counts = np.zeros(MOST + 1, np.int64)
    for part in range(parts):
        counts += np.load(layout.of_pass(number, "ratios.npy", part))
    ranks = np.cumsum(counts)
    threshold = int(np.searchsorted(ranks, quantile * ranks[-1]))
    ratios = [Survivors.read(layout, number, part).ratios for part in range(parts)]
    dropped = [(ratio > threshold) & (ratio != NOT_MEASURED) for ratio in ratios]
    return TooHigh(round(threshold * UNIT, 3), dropped, [ratio.astype(np.float64) * UNIT for ratio in ratios])
