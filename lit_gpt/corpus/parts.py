"""How the sources are divided into parts, and where a build keeps what it has done so far.

A part is a run of source files, in order; it is one task of each pass, one file of documents/ and one of removed/.
Invariant: parts depend on the sources and `part_bytes` alone, so neither workers nor tasks change a byte.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from lit_gpt.prepare.build_request import WORK
from lit_gpt.prepare.records import SourceFile


class Part(NamedTuple):
    number: int
    first_file: int
    """Number of its first source file."""
    sources: tuple[SourceFile, ...]

    @property
    def bytes(self) -> int:
        return sum(source.bytes for source in self.sources)


def divide(sources: Sequence[SourceFile], part_bytes: int) -> list[Part]:
    """Consecutive sources of about `part_bytes` together; a larger one is a part of its own."""
    parts: list[Part] = []
    held: list[SourceFile] = []
    first = size = 0
    for number, source in enumerate(sources):
        if held and size + source.bytes > part_bytes:
            parts.append(Part(len(parts), first, tuple(held)))
            held, first, size = [], number, 0
        held.append(source)
        size += source.bytes
    return [*parts, Part(len(parts), first, tuple(held))]


class Layout(NamedTuple):
    """Names of the files of a corpus and of its build."""

    root: Path

    @property
    def work(self) -> Path:
        return self.root / WORK

    def documents(self, part: int) -> Path:
        return self.root / "documents" / f"{part:05d}.jsonl.zst"

    def removed(self, part: int) -> Path:
        return self.root / "removed" / f"{part:05d}.parquet"

    def ids(self, part: int) -> Path:
        return self.root / "ids" / f"{part:05d}.npy"

    def of_pass(self, number: int, kind: str, part: int) -> Path:
        """A file that a pass leaves for the next: kind is such as "rows.parquet"."""
        return self.work / f"pass-{number}" / f"{part:05d}.{kind}"

    def of_dedup(self, kind: str, number: int) -> Path:
        """A file of paragraph deduplication, of a part or of a partition of the keys."""
        return self.work / "dedup" / f"{number:05d}.{kind}"

    def logs(self, job: str) -> Path:
        return self.work / "jobs" / job
