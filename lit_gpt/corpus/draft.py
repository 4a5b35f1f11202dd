"""A document on its way through the stages: its text now, and which parts of the source text were cut or masked.

A paragraph is what lies between two "\n" of the source text. Cuts remove whole paragraphs, masks replace stretches
inside one; both are named in the source's own coordinates, so that the ledger and the source give the text again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, compress
from typing import Any, NamedTuple

from datatrove.data import Document

LINE_BITS = 40
BATCH_CHARACTERS = 1 << 18
"""Of texts that are measured at once."""


class Mask(NamedTuple):
    """A stretch of the source text, in bytes of UTF-8, and what stands in its place."""

    start: int
    length: int
    replacement: str


@dataclass
class Draft(Document):
    """A document of the pipelines; `text` is what is left of it so far."""

    text: str
    id: str
    media: list[Any] = field(default_factory=list)
    metadata: dict[str, Any] = field(default_factory=dict)
    file: int = 0
    """Number of its source file."""
    line: int = 0
    """Line (row, number in an array) in that file, from 1."""
    others: dict[str, Any] | None = None
    """The record's further fields."""
    source_text: str = ""
    kept: list[int] | None = None
    """Paragraphs that are left; None: all."""
    masks: dict[int, list[Mask]] = field(default_factory=dict)
    """Paragraph -> its masks, in order."""

    @property
    def place(self) -> int:
        return self.file << LINE_BITS | self.line

    def cut(self, paragraphs: Iterable[int]) -> None:
        """Remove paragraphs, by their numbers in the source text."""
        gone = set(paragraphs)
        lines = self.text.split("\n")
        numbers = range(len(lines)) if self.kept is None else self.kept
        stays = [number not in gone for number in numbers]
        self.kept, self.text = list(compress(numbers, stays)), "\n".join(compress(lines, stays))

    def mask(self, masks: Mapping[int, Sequence[Mask]]) -> None:
        """Replace stretches of paragraphs; a paragraph that has masks may get more."""
        for number, more in masks.items():
            self.masks[number] = sorted([*self.masks.get(number, []), *more])
        self.text = apply_edits(self.source_text, set(self._numbers()), self.masks)

    def _numbers(self) -> Iterable[int]:
        return range(self.source_text.count("\n") + 1) if self.kept is None else self.kept

    def source_mask(self, start: int, end: int, replacement: str) -> tuple[int, Mask]:
        """The mask for the characters from `start` to `end` of the text as it is now, and its paragraph."""
        before = self.text[:start]
        at = before.count("\n")
        number = at if self.kept is None else self.kept[at]
        begin = len(before[before.rfind("\n") + 1 :].encode())
        line_start = line_starts(self.source_text)[number]
        shift = 0  # of masks that are there already: bytes of the source less bytes of the text
        for mask in self.masks.get(number, []):
            if line_start + begin + shift >= mask.start:
                shift += mask.length - len(mask.replacement.encode())
        return number, Mask(line_start + begin + shift, len(self.text[start:end].encode()), replacement)


def line_starts(text: str) -> list[int]:
    """Where each paragraph begins, in bytes of UTF-8."""
    sizes = [len(line) + 1 for line in text.encode().split(b"\n")]
    return list(accumulate(sizes[:-1], initial=0))


def apply_edits(source_text: str, kept: set[int] | None, masks: Mapping[int, Sequence[Mask]]) -> str:
    """The source text with its masks, and without the paragraphs that are not kept (None: all are)."""
    lines = source_text.split("\n")
    if masks:
        starts = line_starts(source_text)
        for number, those in masks.items():
            line = lines[number].encode()
            for mask in sorted(those, reverse=True):
                at = mask.start - starts[number]
                line = line[:at] + mask.replacement.encode() + line[at + mask.length :]
            lines[number] = line.decode()
    return "\n".join(line for number, line in enumerate(lines) if kept is None or number in kept)


def in_batches(drafts: Iterable[Draft]) -> Iterator[list[Draft]]:
    """The drafts in lists of BATCH_CHARACTERS or more together; the last may have fewer."""
    held: list[Draft] = []
    size = 0
    for draft in drafts:
        held.append(draft)
        size += len(draft.text)
        if size >= BATCH_CHARACTERS:
            yield held
            held, size = [], 0
    if held:
        yield held
