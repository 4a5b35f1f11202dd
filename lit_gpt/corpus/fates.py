"""What was decided between two passes about the documents that reached the end of the first.

Files of a part: the documents' fates and the cuts of their paragraphs. What the numbers of rules mean is the same for
all parts.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from lit_gpt.corpus.draft import Draft
from lit_gpt.corpus.parts import Layout
from lit_gpt.corpus.survivors import Survivors
from lit_gpt.corpus.task import SAMPLE_CHARACTERS, Task, paragraph_spans
from lit_gpt.files import publish, publishing

MOST_REPEATED = "most.json"
KEPT = 0
"""The number of no rule."""
SPOT_BITS = 32
_DEDUP = "paragraph_dedup"
_PARAGRAPH = (1 << SPOT_BITS) - 1
CUT = np.dtype([("spot", "<u8"), ("rule", "u1"), ("first_part", "<i4"), ("first_spot", "<u8"), ("copies", "<u4")])
"""A cut paragraph. spot: document in the part << SPOT_BITS | paragraph; first_...: the occurrence that stays, or -1."""
FATE = np.dtype([("rule", "u1"), ("value", "<f8"), ("of_part", "<i4"), ("of_document", "<u4")])
"""A document. of_...: the one that it is a near-duplicate of, or -1."""


class Rule(NamedTuple):
    stage: str
    rule: str
    threshold: float | None


def write_rules(layout: Layout, number: int, rules: list[Rule]) -> None:
    """The rules of a pass's decisions; the first has number KEPT + 1."""
    publish(layout.work / f"pass-{number}" / "rules.json", [json.dumps(rules).encode()])


def write_fates(layout: Layout, number: int, part: int, fates: npt.NDArray[Any], cuts: npt.NDArray[Any]) -> None:
    """cuts: in the order of their spots."""
    path = layout.of_pass(number, "fates.npz", part)
    with publishing(path) as partial, open(partial, "wb") as file:
        np.savez(file, fates=fates, cuts=cuts)


class Fates:
    """The decisions about one part, to be applied to its documents one after the other."""

    def __init__(
        self, rules: list[Rule], fates: npt.NDArray[Any], cuts: npt.NDArray[Any], ids: _Ids,
        most: list[tuple[int, int]],
    ) -> None:  # fmt: skip
        """most: copies and spot of paragraphs of this part that have many."""
        self._most: dict[int, list[tuple[int, int]]] = {}
        for copies, spot in most:
            self._most.setdefault(spot >> SPOT_BITS, []).append((copies, spot & _PARAGRAPH))
        self._rules, self._fates, self._cuts = [None, *rules], fates, cuts
        documents = (cuts["spot"] >> np.uint64(SPOT_BITS)).astype(np.int64)
        self._ends = np.searchsorted(documents, np.arange(len(fates)), side="right").tolist()
        self._cut_ids = ids.of(cuts["first_part"], (cuts["first_spot"] >> np.uint64(SPOT_BITS)).astype(np.int64))
        self._fate_ids = ids.of(fates["of_part"], fates["of_document"].astype(np.int64))

    @staticmethod
    def read(layout: Layout, number: int, part: int, documents: int) -> Fates:
        rules = [Rule(*rule) for rule in json.loads((layout.work / f"pass-{number}" / "rules.json").read_bytes())]
        with np.load(layout.of_pass(number, "fates.npz", part)) as arrays:
            fates, cuts = arrays["fates"], arrays["cuts"]
        if len(fates) != documents:
            raise RuntimeError(f"part {part}: {len(fates)} fates of {documents} documents")
        path = layout.work / MOST_REPEATED
        listed = json.loads(path.read_bytes()) if path.exists() and any(rule.stage == _DEDUP for rule in rules) else []
        most = [(copies, spot) for copies, of_part, spot in listed if of_part == part]
        return Fates(rules, fates, cuts, _Ids(layout, number), most)

    def apply(self, index: int, draft: Draft, task: Task) -> bool:
        """Cut the document with that number in the part; returns whether it is kept."""
        rule = self._rules[int(self._fates["rule"][index])]
        if rule is not None:
            value = float(self._fates["value"][index])
            task.remove(
                draft, rule.stage, rule.rule, value, rule.threshold, duplicate_of_document=self._fate_ids[index]
            )
            return False
        for copies, paragraph in self._most.get(index, []):
            text = draft.source_text.split("\n")[paragraph][:SAMPLE_CHARACTERS]
            task.most.append({"copies": copies, "document_id": draft.id, "paragraph": paragraph, "text": text})
        begin, end = self._ends[index - 1] if index else 0, self._ends[index]
        if begin < end:
            self._cut(draft, task, begin, end)
        return True

    def _cut(self, draft: Draft, task: Task, begin: int, end: int) -> None:
        starts, sizes = paragraph_spans(draft)
        rows = []
        for (spot, code, first_part, first_spot, copies), of in zip(
            self._cuts[begin:end].tolist(), self._cut_ids[begin:end], strict=True
        ):
            paragraph = spot & _PARAGRAPH
            rule = self._rules[code]
            assert rule is not None
            known = first_part >= 0
            rows.append((*rule, paragraph, starts[paragraph], sizes[paragraph], copies if known else None, of,
                         first_spot & _PARAGRAPH if known else None))  # fmt: skip
        task.cut(draft, rows)
        draft.cut(row[3] for row in rows)


class _Ids:
    """Ids of documents that reached the end of a pass."""

    def __init__(self, layout: Layout, number: int) -> None:
        self._layout, self._number = layout, number

    def of(self, parts: npt.NDArray[np.int32], documents: npt.NDArray[np.int64]) -> list[str | None]:
        """The id of each document by its part and its number there; None where the part is -1."""
        found: list[str | None] = [None] * len(parts)
        for part in np.unique(parts[parts >= 0]).tolist():
            ids = Survivors.read(self._layout, self._number, part).ids
            where = np.flatnonzero(parts == part)
            for at, id in zip(where.tolist(), ids.take(documents[where]).to_pylist(), strict=True):
                found[at] = id
        return found
