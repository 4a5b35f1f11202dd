"""How much of its input a program may leave out, and how it says that it was too much. All programs have this guard."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from lit_gpt.cli import BadInput
from lit_gpt.prepare.records import DAMAGE, Document, Piece, Reject, SourceFile

CHECK_LINES = 1_000_000
"""From here on too many rejects end a program at once; before, they are counted at its end."""
_WAYS_OUT = {
    "bad UTF-8": "`iconv -f LATIN1 -t UTF-8` converts files in Latin-1; it spoils lines that are UTF-8 already",
    "no text": "--text_field names the field of the text",
    "duplicate id": "--id_field names the field of the id; --id_field '' takes file and line, for ids that restart in "
    "each file",
}


class ListedReject(NamedTuple):
    file: str
    line: int
    kind: str
    detail: str


class RejectGuard:
    """Counts records and rejects; raises BadInput for a damaged file, and where too many records are rejected."""

    def __init__(self, max_reject_fraction: float, allow_damaged_files: bool) -> None:
        self.max_reject_fraction = max_reject_fraction
        self.allow_damaged_files = allow_damaged_files
        self.lines = 0
        self.kinds: Counter[str] = Counter()
        self.first: ListedReject | None = None

    @property
    def rejects(self) -> int:
        return self.kinds.total()

    def admit(self, source: SourceFile, piece: Piece) -> None:
        """Raise BadInput if a part of the file could not be read, unless that was allowed."""
        if not self.allow_damaged_files and (damage := piece.damage):
            refuse_damage(source, *damage)

    def count(self, source: SourceFile, record: Document | Reject) -> None:
        """Count a record; with too many rejects among very many, raise BadInput at once."""
        self.lines += 1
        if isinstance(record, Reject):
            self.kinds[record.kind] += 1
            self.first = self.first or ListedReject(source.name, *record)
            if self.lines >= CHECK_LINES:
                self.check()

    def check(self) -> None:
        """Raise BadInput if too many records are rejected."""
        if self.first:
            refuse_rejects(self.lines, self.kinds, self.first, self.max_reject_fraction)


def refuse_damage(source: SourceFile, line: int, kind: str, detail: str) -> None:
    """Raise BadInput if a reject of `source` stands for what could not be read."""
    if kind in DAMAGE:
        what = "from line" if kind == DAMAGE[0] else "at row"
        raise BadInput(
            f"{source.path} cannot be read {what} {line} on ({detail}): fetch it again, "
            "leave it out, or give --allow_damaged_files, which takes the rest and rejects what is lost"
        )


def refuse_rejects(
    lines: int, kinds: Mapping[str, int], first: ListedReject, max_reject_fraction: float, listing: object = None
) -> None:
    """Raise BadInput if more than the share `max_reject_fraction` of all records was rejected.

    `kinds` counts the rejects by kind, `first` is one of them, and `listing` the file that lists them, if any.
    """
    rejects = sum(kinds.values())
    if rejects <= max_reject_fraction * lines:
        return
    counts = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    most = max(kinds, key=lambda kind: kinds[kind])
    raise BadInput(
        f"{rejects} of {lines} lines rejected, more than --max_reject_fraction {max_reject_fraction}: {counts}; "
        f"the first in {first.file} line {first.line} ({first.kind}: {first.detail})"
        + (f"; all in {listing}" if listing else "")
        + (f". {_WAYS_OUT[most]}" if most in _WAYS_OUT else "")
    )
