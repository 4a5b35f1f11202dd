"""Between two passes: which documents a quantile of the token-to-word ratios removes, where no other stage decides."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from datatrove.pipeline.base import PipelineStep

from lit_gpt.corpus.fates import CUT, FATE, Rule, write_fates, write_rules
from lit_gpt.corpus.parts import Layout
from lit_gpt.corpus.ratio import STAGE, dropped_by_ratio


class SettleRatioStep(PipelineStep):
    """One task for all parts: writes the fates of a pass."""

    name = "settle ratios"
    type = "filter"

    def __init__(self, layout: Layout, number: int, parts: int, quantile: float) -> None:
        super().__init__()
        self._layout, self._number, self._parts, self._quantile = layout, number, parts, quantile

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        ratio = dropped_by_ratio(self._layout, self._number, self._parts, self._quantile)
        write_rules(self._layout, self._number, [Rule(STAGE, "max_token_to_word", ratio.threshold)])
        for part, (dropped, values) in enumerate(zip(ratio.dropped, ratio.values, strict=True)):
            fates = np.zeros(len(dropped), FATE)
            fates["rule"], fates["value"], fates["of_part"] = dropped, values, -1
            write_fates(self._layout, self._number, part, fates, np.zeros(0, CUT))
        yield from ()
