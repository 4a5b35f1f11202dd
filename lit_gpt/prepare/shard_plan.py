"""Which document goes into which shard of which split, computed from the sorted runs' indexes before any is written.

Invariants: the plan depends on the documents and its arguments, not on how documents are spread over runs; a shard is a
range of (key, place); equal texts are in one split; if validation data is wanted and not all
texts are equal, no split is empty.
Costs: one pass over the indexes, a range at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lit_gpt.prepare.token_runs import CONTENT, KEY, PLACE, TEXT_BYTES, TOKENS, Columns, TokenRun, merged

SPLITS = ("train", "val")


class ShardPlan(NamedTuple):
    """A shard to be written: the documents of `split` from (key, place) `first` to `last`, both included."""

    split: str
    number: int
    first: tuple[int, int]
    last: tuple[int, int]
    documents: int
    tokens: int


class SplitRule(NamedTuple):
    """Which documents belong to which split."""

    threshold: int
    """A text whose hash is below this is validation data."""
    duplicates: Columns
    """Places of the documents that are left out because their id occurs earlier."""

    def selects(self, split: str, columns: Columns) -> npt.NDArray[np.bool_]:
        """Which columns of a run's index belong to `split`: (documents,) of bool."""
        in_val = columns[CONTENT] < np.uint64(self.threshold)
        return (in_val if split == "val" else ~in_val) & ~np.isin(columns[PLACE], self.duplicates)


@dataclass
class SplitPlan:
    """One split's shards and statistics; documents are added in their final order."""

    split: str
    shard_tokens: int
    shards: list[ShardPlan] = field(default_factory=list)
    lengths: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    """lengths[n]: number of documents with n tokens, EOS included."""
    text_bytes: int = 0
    _open: ShardPlan | None = None

    def add(self, columns: Columns) -> None:
        """Add the next documents (columns of a run's index): a shard takes as many as fit, and at least one."""
        tokens = columns[TOKENS].astype(np.int64)
        self.text_bytes += int(columns[TEXT_BYTES].sum())
        counts = np.bincount(tokens)
        size = max(len(counts), len(self.lengths))
        self.lengths = np.pad(self.lengths, (0, size - len(self.lengths))) + np.pad(counts, (0, size - len(counts)))
        ends = np.cumsum(tokens)
        start = before = 0
        while start < len(ends):
            used = self._open.tokens if self._open else 0
            stop = int(np.searchsorted(ends, before + self.shard_tokens - used, side="right"))
            if stop == start and self._open:
                self.close()
                continue
            stop = max(stop, start + 1)
            self._extend(columns[:, start:stop], int(ends[stop - 1]) - before)
            start, before = stop, int(ends[stop - 1])

    def _extend(self, columns: Columns, tokens: int) -> None:
        first, last = ((int(columns[KEY, at]), int(columns[PLACE, at])) for at in (0, -1))
        shard = self._open or ShardPlan(self.split, len(self.shards), first, last, 0, 0)
        self._open = shard._replace(
            last=last, documents=shard.documents + columns.shape[1], tokens=shard.tokens + tokens
        )

    def close(self) -> None:
        if self._open:
            self.shards.append(self._open)
            self._open = None

    @property
    def documents(self) -> int:
        return sum(shard.documents for shard in self.shards)

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)


def plan_shards(runs: Sequence[TokenRun], rule: SplitRule, shard_tokens: int) -> dict[str, SplitPlan]:
    """The plan of each split; a split may have no shards."""
    plans = {split: SplitPlan(split, shard_tokens) for split in SPLITS}
    for columns in merged([run.documents for run in runs]):
        for split, plan in plans.items():
            plan.add(columns[:, rule.selects(split, columns)])
    for plan in plans.values():
        plan.close()
    return plans


def split_threshold(runs: Sequence[TokenRun], duplicates: Columns, val_fraction: float) -> int:
    """The text hash below which a document is validation data: `val_fraction` of the range of hashes.

    It is moved so that neither split is empty; 0, for no validation data, where all texts are equal or none is wanted.
    """
    low, high = 1 << 64, -1
    for run in runs:
        kept = run.documents[CONTENT, ~np.isin(run.documents[PLACE], duplicates)]
        if len(kept):
            low, high = min(low, int(kept.min())), max(high, int(kept.max()))
    if not val_fraction or low >= high:
        return 0
    return min(max(int(val_fraction * 2**64), low + 1), high)
