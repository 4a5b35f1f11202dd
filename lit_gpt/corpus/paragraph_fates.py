"""Paragraph deduplication, between the passes: which paragraphs go, and which documents with them.

Of equal paragraphs the earliest stays whose document stays. Whether a document stays depends on documents before it
alone, so this is well defined; it is found in rounds: documents that fall give their first occurrences to the next,
until no fate changes. Rounds read arrays, no text.
Costs: a byte and a half of memory a document in all; each round reads the groups once.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from datatrove.pipeline.base import PipelineStep

from lit_gpt.corpus.fates import CUT, FATE, KEPT, MOST_REPEATED, SPOT_BITS, Rule, write_fates, write_rules
from lit_gpt.corpus.later import read_later
from lit_gpt.corpus.paragraph_groups import partitions
from lit_gpt.corpus.paragraph_keys import BLANK
from lit_gpt.corpus.parts import Layout
from lit_gpt.corpus.ratio import TooHigh, dropped_by_ratio
from lit_gpt.corpus.settings import DedupSettings
from lit_gpt.files import publish, publishing, write_json

STAGE = "paragraph_dedup"
RATIO, FRACTION, WORDS, REPEATED, LEFT_OVER = range(1, 6)
"""Numbers of the rules of rules_of."""
_SPOT = np.uint64(SPOT_BITS)
_PARAGRAPH = np.uint64((1 << SPOT_BITS) - 1)

TRIED = 2
"""Documents that one after the other keep a text, and are removed by a later stage, before several try at a time."""
MOST = 20
"""Paragraphs of the report's list of those with most copies."""

log = logging.getLogger(__name__)


def rules_of(settings: DedupSettings, ratio: TooHigh | None) -> list[Rule]:
    return [
        Rule("token_to_word", "max_token_to_word", ratio.threshold if ratio else None),
        Rule(STAGE, "min_kept_fraction", settings.min_kept_fraction),
        Rule(STAGE, "min_kept_words", settings.min_kept_words),
        Rule(STAGE, "repeated_paragraph", 1),
        Rule(STAGE, "left_over", settings.min_words),
    ]


class Decision(NamedTuple):
    cuts: npt.NDArray[np.uint8]
    """Rule of each paragraph."""
    fates: npt.NDArray[np.uint8]
    """Rule of each document."""
    values: npt.NDArray[np.float64]
    """What the rule of the document compares with its threshold."""


def decide(
    words: npt.NDArray[np.uint32], starts: npt.NDArray[np.int64], repeated: npt.NDArray[np.bool_],
    settings: DedupSettings,
) -> Decision:  # fmt: skip
    """Which paragraphs and documents go, where `repeated` says which paragraphs occur before."""
    blank = words == BLANK
    count = np.where(blank, 0, words).astype(np.int64)
    short = count < settings.min_words
    gone = repeated & ~short
    loose = short & (repeated | blank) & ~gone  # goes where it lies between paragraphs that go
    position = np.arange(len(words))
    document = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
    before = np.maximum.accumulate(np.where(loose, -1, position)) if len(words) else position
    after = np.minimum.accumulate(np.where(loose, len(words), position)[::-1])[::-1] if len(words) else position
    inside = loose & (before >= starts[document]) & (after < starts[document + 1])
    left_over = np.zeros(len(words), bool)
    left_over[inside] = gone[before[inside]] & gone[after[inside]]
    cuts = np.where(gone, REPEATED, np.where(left_over, LEFT_OVER, KEPT)).astype(np.uint8)
    total = _sums(count, starts)
    kept = _sums(np.where(cuts == KEPT, count, 0), starts)
    lost = _sums((cuts != KEPT).astype(np.int64), starts) > 0
    fraction = kept / np.maximum(total, 1)
    few = lost & (fraction < settings.min_kept_fraction)
    little = lost & ~few & (kept < max(1, settings.min_kept_words))
    fates = np.where(few, FRACTION, np.where(little, WORDS, KEPT)).astype(np.uint8)
    return Decision(cuts, fates, np.where(few, fraction, kept))


def _sums(values: npt.NDArray[np.int64], starts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return np.diff(np.append(0, np.cumsum(values))[starts])


class SettleStep(PipelineStep):
    """One task for all parts: writes the fates of a pass, and what was found as dedup.json beside them."""

    name = "settle paragraphs"
    type = "dedup"

    def __init__(
        self, layout: Layout, number: int, parts: int, settings: DedupSettings, quantile: float | None
    ) -> None:
        """quantile: of the ratios, if the pass measured them for a limit that they themselves give."""
        super().__init__()
        self._layout, self._number, self._parts = layout, number, parts
        self._settings, self._quantile = settings, quantile

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        ratio = dropped_by_ratio(self._layout, self._number, self._parts, self._quantile) if self._quantile else None
        rounds = _Rounds(self._layout, self._parts, self._settings, ratio)
        rounds.settle()
        write_rules(self._layout, self._number, rules_of(self._settings, ratio))
        for part in range(self._parts):
            write_fates(self._layout, self._number, part, *rounds.result(part))
        write_json(self._layout.work / "dedup.json", rounds.facts())
        publish(self._layout.work / MOST_REPEATED, [json.dumps(rounds.most_repeated()).encode()])
        yield from ()


class _Rounds:
    def __init__(self, layout: Layout, parts: int, settings: DedupSettings, ratio: TooHigh | None) -> None:
        self._layout, self._parts, self._settings, self._ratio = layout, parts, settings, ratio
        sizes = [len(np.load(layout.of_dedup("starts.npy", part), mmap_mode="r")) - 1 for part in range(parts)]
        self._offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        self._partitions = partitions(layout, parts)
        self._outside = np.zeros(self._offsets[-1], bool)  # removed by another stage: holds no first occurrence
        if ratio is not None:
            self._outside[:] = np.concatenate(ratio.dropped)
        self._later = np.concatenate(read_later(layout, sizes))
        self._outside |= self._later
        self._dead = self._outside.copy()
        self._vanished = self._rounds = self._kept_again = 0

    def settle(self) -> None:
        while True:
            self._rounds += 1
            self._kept_again = 0
            for partition in range(self._partitions):
                self._write_repeats(partition)
            dead = np.concatenate([self._decided(part).fates != KEPT for part in range(self._parts)])
            dead |= self._outside
            changed = int(np.count_nonzero(dead != self._dead))
            log.info("paragraph_dedup, round %d: %d fates changed", self._rounds, changed)
            if not self._settings.keep_next_survivor:
                self._vanished = sum(self._count_vanished(partition, dead) for partition in range(self._partitions))
                return
            self._dead = dead
            if not changed:
                return

    def _members(self, partition: int) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.int64]]:
        members, bounds = (self._layout.of_dedup(kind, partition) for kind in ("members.npy", "bounds.npy"))
        return np.load(members), np.load(bounds)

    def _firsts(self, members: Any, bounds: Any) -> tuple[Any, Any, Any]:
        """Number of each member's group; where the first member is whose document stays; each member's document."""
        documents = self._offsets[members[0].astype(np.int64)] + (members[1] >> _SPOT).astype(np.int64)
        alive = ~self._dead[documents]
        none = members.shape[1]
        first = np.minimum.reduceat(np.where(alive, np.arange(none), none), bounds[:-1])
        return np.repeat(np.arange(len(bounds) - 1), np.diff(bounds)), first, documents

    def _write_repeats(self, partition: int) -> None:
        """Write which paragraphs of a partition occur before."""
        members, bounds = self._members(partition)
        found = np.zeros(0, _REPEAT)
        if len(bounds) > 1:
            group, first, documents = self._firsts(members, bounds)
            position = np.arange(members.shape[1])
            # its own first one counts even if it falls: its fate depends on documents before it, never on itself
            changes = np.append(True, (documents[1:] != documents[:-1]) | (group[1:] != group[:-1]))
            own_first = np.maximum.accumulate(np.where(changes, position, 0))
            earliest = np.minimum(first[group], own_first)
            again = self._holds_again(group, first, documents, bounds) & (position == own_first) & (position > earliest)
            self._kept_again += int(np.count_nonzero(again))
            later = np.flatnonzero((position > earliest) & ~again)
            found = np.zeros(len(later), _REPEAT)
            of = earliest[later]
            found["part"], found["spot"] = members[:, later]
            found["first_part"], found["first_spot"] = members[:, of]
            found["copies"] = np.diff(bounds)[group[later]]
            found = found[np.lexsort((found["spot"], found["part"]))]
        with publishing(self._layout.of_dedup("repeats.npy", partition)) as partial, open(partial, "wb") as file:
            np.save(file, found)

    def _holds_again(self, group: Any, first: Any, documents: Any, bounds: Any) -> npt.NDArray[np.bool_]:
        """Which members keep a text beside the first that stays: where later stages removed more than TRIED documents
        that had it first, twice as many as these are beyond that. Else each round would try one more of all that have
        an evaluation's text, say; so they grow."""
        before = self._later[documents] & (np.arange(len(group)) < first[group])
        further = np.maximum(np.add.reduceat(before.astype(np.int64), bounds[:-1]) - TRIED, 0) * 2
        if not further.any():
            return np.zeros(len(group), bool)
        alive = ~self._dead[documents]
        number = np.cumsum(alive)
        number -= (number - alive)[bounds[:-1]][group]  # of the group's members whose documents stay, from 1
        held: npt.NDArray[np.bool_] = alive & (number <= 1 + further[group])
        return held

    def _count_vanished(self, partition: int, dead: Any) -> int:
        """How many texts of a partition no document has any more."""
        members, bounds = self._members(partition)
        if len(bounds) == 1:
            return 0
        _, first, documents = self._firsts(members, bounds)
        known = first[first < members.shape[1]]
        return int(np.count_nonzero(dead[documents[known]]))

    def _repeats(self, part: int) -> npt.NDArray[Any]:
        """The repeated paragraphs of a part, in its order."""
        slices = [np.zeros(0, _REPEAT)]
        for partition in range(self._partitions):
            found = np.load(self._layout.of_dedup("repeats.npy", partition), mmap_mode="r")
            begin, end = np.searchsorted(found["part"], [part, part + 1])
            slices.append(np.array(found[begin:end]))  # a copy: a view would keep the whole file mapped
        repeats = np.concatenate(slices)
        return repeats[np.argsort(repeats["spot"], kind="stable")]

    def _starts(self, part: int) -> npt.NDArray[np.int64]:
        starts: npt.NDArray[np.int64] = np.load(self._layout.of_dedup("starts.npy", part))
        return starts

    def _decided(self, part: int) -> Decision:
        words, starts = np.load(self._layout.of_dedup("words.npy", part)), self._starts(part)
        spots = self._repeats(part)["spot"]
        repeated = np.zeros(len(words), bool)
        repeated[starts[(spots >> _SPOT).astype(np.int64)] + (spots & _PARAGRAPH).astype(np.int64)] = True
        return decide(words, starts, repeated, self._settings)

    def result(self, part: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """Fates and cuts of a part; also the cuts that documents fell by, which the review needs."""
        decision, repeats, starts = self._decided(part), self._repeats(part), self._starts(part)
        fates = np.zeros(len(decision.fates), FATE)
        fates["rule"], fates["value"], fates["of_part"] = decision.fates, decision.values, -1
        if self._ratio is not None:
            dropped = self._ratio.dropped[part]
            fates["rule"][dropped], fates["value"][dropped] = RATIO, self._ratio.values[part][dropped]
        cut = np.flatnonzero(decision.cuts)
        document = np.searchsorted(starts, cut, side="right") - 1
        here = fates["rule"][document] != RATIO
        cut, document = cut[here], document[here]
        cuts = np.zeros(len(cut), CUT)
        cuts["spot"] = document.astype(np.uint64) << _SPOT | (cut - starts[document]).astype(np.uint64)
        cuts["rule"], cuts["first_part"] = decision.cuts[cut], -1
        at = np.searchsorted(repeats["spot"], cuts["spot"])
        known = np.flatnonzero(np.append(repeats["spot"], 0)[at] == cuts["spot"])
        known = known[at[known] < len(repeats)]
        for name in ("first_part", "first_spot", "copies"):
            cuts[name][known] = repeats[name][at[known]]
        return fates, cuts

    def most_repeated(self) -> list[tuple[int, ...]]:
        """Copies, and part and spot of the occurrence that stays, of the paragraphs with most copies."""
        found: list[tuple[int, ...]] = []
        for partition in range(self._partitions):
            members, bounds = self._members(partition)
            if len(bounds) > 1:
                _, first, _ = self._firsts(members, bounds)
                copies = np.diff(bounds)
                most = np.argsort(-copies, kind="stable")[:MOST]
                most = most[first[most] < members.shape[1]]
                found += [(int(copies[at]), *map(int, members[:, first[at]])) for at in most.tolist()]
        return sorted(found, key=lambda one: (-one[0], one[1:]))[:MOST]

    def facts(self) -> dict[str, Any]:
        said = {"rounds": self._rounds, "vanished_texts": self._vanished, "kept_again": self._kept_again}
        return {**said, "partitions": self._partitions}


_REPEAT = np.dtype([("part", "<i4"), ("spot", "<u8"), ("first_part", "<i4"), ("first_spot", "<u8"), ("copies", "<u4")])
