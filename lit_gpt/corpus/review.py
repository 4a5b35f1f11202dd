"""After the last pass: texts that are lost, as stages after paragraph_dedup removed the documents that had them first.

With keep_next_survivor the documents that later stages removed count as holders of nothing, fates are settled again,
and the later passes run again, until no text is lost any more. A document that was removed in a round counts as holder
of nothing in all that follow, so they end; with other texts around it, it may stay in the last one: then its texts
may stay twice, and it is counted. Where no later stage removes a document, this finds nothing and costs nothing.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from datatrove.pipeline.base import PipelineStep

from lit_gpt.corpus.fates import KEPT, SPOT_BITS
from lit_gpt.corpus.last_steps import KEPT_PLACES
from lit_gpt.corpus.later import LATER, read_later
from lit_gpt.corpus.parts import Layout
from lit_gpt.corpus.survivors import Survivors
from lit_gpt.files import publishing, write_json

FOUND = "review.json"

log = logging.getLogger(__name__)


class AnotherRound(Exception):
    """The later passes must run again: the same jobs, started again, do it."""


class ReviewStep(PipelineStep):
    """One task for all parts. Raises AnotherRound after it has undone what must be done again."""

    name = "review"
    type = "dedup"

    def __init__(self, layout: Layout, number: int, last: int, parts: int, keep_next: bool, again: list[str]) -> None:
        """number: of the pass that paragraph_dedup ends; last: of the last pass; again: jobs of another round."""
        super().__init__()
        self._layout, self._number, self._last, self._parts = layout, number, last, parts
        self._keep_next, self._again = keep_next, again

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        later = [self._removed_later(part) for part in range(self._parts)]
        before = read_later(self._layout, [len(one) for one in later])
        lost = sum(self._lost(part, later, before) for part in range(self._parts))
        if self._keep_next and lost:
            log.info("paragraph_dedup: later stages removed what %d paragraphs repeat: another round", lost)
            for job in self._again:
                shutil.rmtree(self._layout.logs(job) / "completions", ignore_errors=True)
            with publishing(self._layout.work / LATER) as partial, open(partial, "wb") as file:
                np.save(file, np.concatenate(later) | np.concatenate(before))
            raise AnotherRound("give the same command again: stages after paragraph_dedup removed first occurrences")
        twice = sum(int(np.count_nonzero(old & ~new)) for old, new in zip(before, later, strict=True))
        write_json(self._layout.work / FOUND, {"lost_later": lost, "kept_twice": twice})
        yield from ()

    def _removed_later(self, part: int) -> npt.NDArray[np.bool_]:
        """Of the documents that reached paragraph_dedup: whether it kept them, and a later stage did not."""
        places = Survivors.read(self._layout, self._number, part).places
        stay = np.load(self._layout.of_pass(self._last, KEPT_PLACES, part))
        return (self._fates(part)["fates"]["rule"] == KEPT) & ~np.isin(places, stay)

    def _fates(self, part: int) -> Any:
        return np.load(self._layout.of_pass(self._number, "fates.npz", part))

    def _lost(self, part: int, later: list[npt.NDArray[np.bool_]], before: list[npt.NDArray[np.bool_]]) -> int:
        """Paragraphs cut as copies of what later stages removed, but those of documents that these removed."""
        cuts = self._fates(part)["cuts"]
        document = (cuts["spot"] >> np.uint64(SPOT_BITS)).astype(np.int64)
        cuts = cuts[~later[part][document] & (cuts["first_part"] >= 0)]
        first = (cuts["first_spot"] >> np.uint64(SPOT_BITS)).astype(np.int64)
        gone = [later[one][at] and not before[one][at] for one, at in zip(cuts["first_part"], first, strict=True)]
        return int(np.count_nonzero(gone))
