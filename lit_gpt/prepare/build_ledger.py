"""The ledger of a store build: what became of every line of input, and how long the documents are.

Invariant: lines = documents + rejects, and each reject is in rejects.jsonl with its file, line, kind and a detail.
Costs: the rejects are held in memory; a build with too many stops before they grow large.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from lit_gpt.files import publish
from lit_gpt.prepare.reject_guard import ListedReject, refuse_rejects
from lit_gpt.prepare.token_runs import Columns, RunSummary, file_and_line


class Ledger(NamedTuple):
    lines: int
    documents: int
    rejects: list[ListedReject]
    """In the order of the input."""

    @property
    def kinds(self) -> dict[str, int]:
        return dict(sorted(Counter(reject.kind for reject in self.rejects).items()))

    def check(self, max_reject_fraction: float, listing: Path) -> None:
        """Raise BadInput if too many lines are rejected; `listing` is the file that lists them."""
        if self.rejects:
            refuse_rejects(self.lines, self.kinds, self.rejects[0], max_reject_fraction, listing)


def make_ledger(runs: Iterable[RunSummary], duplicates: Columns, source_names: Sequence[str]) -> Ledger:
    """The ledger of all runs; `duplicates` come from token_runs.duplicate_places."""
    lines = documents = 0
    rejects: list[tuple[int, int, str, str]] = []
    for summary in runs:
        lines += summary.lines
        documents += summary.documents
        rejects += [(file, line, kind, detail) for file, line, kind, detail in summary.rejects]  # JSON made them lists
    for where, first in duplicates.T.tolist():
        file, line = file_and_line(first)
        rejects.append((*file_and_line(where), "duplicate id", f"first in {source_names[file]} line {line}"))
    documents -= duplicates.shape[1]
    if lines != documents + len(rejects):
        raise RuntimeError(f"{lines} lines are not {documents} documents and {len(rejects)} rejects")
    listed = [ListedReject(source_names[file], line, kind, detail) for file, line, kind, detail in sorted(rejects)]
    return Ledger(lines, documents, listed)


def write_rejects(path: Path, rejects: Iterable[ListedReject]) -> None:
    publish(path, (json.dumps(reject._asdict(), ensure_ascii=False).encode() + b"\n" for reject in rejects))


def length_statistics(lengths: npt.NDArray[np.int64]) -> dict[str, Any]:
    """Mean, quantiles and a histogram in powers of two of document lengths; lengths[n] documents have n tokens."""
    documents = int(lengths.sum())
    ranks = np.cumsum(lengths)
    quantiles = {
        name: int(np.searchsorted(ranks, max(1, share * documents)))
        for name, share in (("min", 0.0), ("median", 0.5), ("p90", 0.9), ("p99", 0.99), ("max", 1.0))
    }
    edges = [1 << power for power in range(len(lengths).bit_length() + 1)]
    histogram = [
        [low, high, int(lengths[low:high].sum())]
        for low, high in itertools.pairwise(edges)
        if high > quantiles["min"] and low <= quantiles["max"]
    ]
    return {
        "mean": round(float(lengths @ np.arange(len(lengths))) / documents, 1),
        **quantiles,
        "histogram": histogram,
    }
