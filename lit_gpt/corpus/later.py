"""Which documents stages after paragraph_dedup removed in the round before (review.py)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lit_gpt.corpus.parts import Layout

LATER = "later.npy"


def read_later(layout: Layout, sizes: list[int]) -> list[npt.NDArray[np.bool_]]:
    """For each part: which documents later stages removed in the round before."""
    path = layout.work / LATER
    flags = np.load(path) if path.exists() else np.zeros(sum(sizes), bool)
    return np.split(flags, np.cumsum(sizes)[:-1])
