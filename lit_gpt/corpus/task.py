"""What the steps of one task share: the rows that they add to the ledger, and what they count and measure."""

from __future__ import annotations

from collections import Counter
from itertools import accumulate
from typing import Any

import numpy as np

from lit_gpt.corpus.draft import Draft, Mask
from lit_gpt.corpus.ledger import Row, Rows

BINS = 60
SAMPLES, SAMPLE_CHARACTERS = 4, 600


class Task:
    """One part in one pass."""

    def __init__(self, source_names: list[str]) -> None:
        """source_names: of all source files, by number."""
        self._names = source_names
        self.rows = Rows()
        self.counts: Counter[str] = Counter()
        self.rejects: list[tuple[str, int, str, str]] = []
        self.histograms: dict[str, Histogram] = {}
        self.ratios: Any = None
        """Documents of each ratio, in its units, where the pass measures it."""
        self.samples: dict[str, list[tuple[int, str, str, str]]] = {}
        """Stage and rule -> rank by a hash, id, why, and text of some that were removed."""

        self.most: list[dict[str, Any]] = []
        """Paragraphs with many copies."""

    def remove(
        self, draft: Draft, stage: str, rule: str, value: float | None, threshold: float | None, **more: Any
    ) -> None:
        """Record that a whole document is removed."""
        size = len(draft.source_text.encode())
        row = self._row(draft, stage, rule, value, threshold, None, 0, size, **more)
        self.rows.add(row)
        self._sample(row, draft.text)

    def cut(self, draft: Draft, cuts: list[tuple[Any, ...]]) -> None:
        """Record that paragraphs are removed: stage, rule, threshold, paragraph, start, length, value, and of which
        document's which paragraph each is a copy."""
        file, line, name = draft.file, draft.line, self._names[draft.file]
        for stage, rule, threshold, paragraph, start, length, value, of, of_paragraph in cuts:
            row = Row(
                file, draft.id, name, line, stage, rule, value, threshold, paragraph, start, length, of, of_paragraph
            )
            self.rows.add(row)
            self._sample(row, draft.source_text, paragraph)

    def mask(self, draft: Draft, stage: str, rule: str, masks: list[tuple[int, Mask]]) -> None:
        """Record that stretches are masked."""
        for paragraph, mask in masks:
            self.rows.add(
                self._row(draft, stage, rule, None, None, paragraph, mask.start, mask.length,
                          replacement=mask.replacement)
            )  # fmt: skip

    def _row(
        self, draft: Draft, stage: str, rule: str, value: float | None = None, threshold: float | None = None,
        paragraph: int | None = None, start: int = 0, length: int = 0, **more: Any,
    ) -> Row:  # fmt: skip
        name = self._names[draft.file]
        return Row(
            draft.file, draft.id, name, draft.line, stage, rule, value, threshold, paragraph, start, length, **more
        )

    def _sample(self, row: Row, text: str, paragraph: int | None = None) -> None:
        """Keep the text if it is among the SAMPLES of its rule with the smallest hashes, in any order."""
        held = self.samples.setdefault(f"{row.stage}: {row.rule}", [])
        place = row.line << 24 ^ row.file << 12 ^ (paragraph or 0)
        rank = (place * 0x9E3779B97F4A7C15 & (1 << 64) - 1) * 0xD6E8FEB86659FD93 & (1 << 64) - 1
        if len(held) == SAMPLES and rank > held[-1][0]:
            return
        if paragraph is not None:
            text = text.split("\n")[paragraph]
        why = "" if row.value is None else f"{row.value:.4g}"
        held.append((rank, row.document_id, why, text[:SAMPLE_CHARACTERS]))
        held.sort()
        del held[SAMPLES:]

    def measure(self, name: str, values: Any, highest: float) -> None:
        """Count values of a measure in the bins of its histogram, which ends at `highest`."""
        self.histograms.setdefault(name, Histogram(highest)).add(values)


class Histogram:
    """Counts in BINS equal bins from 0; what lies beyond the last edge counts in the last bin."""

    def __init__(self, highest: float) -> None:
        self.highest = highest
        self.counts = np.zeros(BINS, np.int64)

    def add(self, values: Any) -> None:
        numbers = np.minimum(np.asarray(values, np.float64) * (BINS / self.highest), BINS - 1).astype(np.int64)
        self.counts += np.bincount(numbers, minlength=BINS)

    def as_json(self) -> dict[str, Any]:
        return {"highest": self.highest, "counts": self.counts.tolist()}


def paragraph_spans(draft: Draft) -> tuple[list[int], list[int]]:
    """Starts and lengths, in bytes, of the paragraphs of the source text."""
    sizes = list(map(len, draft.source_text.encode().split(b"\n")))
    return list(accumulate(sizes, lambda start, size: start + size + 1, initial=0)), sizes
