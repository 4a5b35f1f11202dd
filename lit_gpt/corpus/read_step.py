"""The first steps of a pass: read a part's documents, and bring each to where the passes before left it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

from datatrove.pipeline.base import PipelineStep

from lit_gpt.cli import BadInput
from lit_gpt.corpus.draft import Draft, Mask
from lit_gpt.corpus.fates import Fates
from lit_gpt.corpus.ledger import by_document, read_rows
from lit_gpt.corpus.parts import Layout, Part
from lit_gpt.corpus.survivors import Survivors
from lit_gpt.corpus.task import Task
from lit_gpt.files import open_own
from lit_gpt.prepare.document_source import read_pieces
from lit_gpt.prepare.records import Document, Fields, SourceFile, parse_piece
from lit_gpt.prepare.reject_guard import RejectGuard


class ReadStep(PipelineStep):
    """The documents of a part, in order. In the first pass it counts them and the rejects."""

    name = "read"
    type = "source"

    def __init__(
        self, parts: Sequence[Part], fields: Fields, guard: tuple[float, bool], layout: Layout, number: int, task: Task
    ) -> None:
        """guard: the arguments of a RejectGuard. number: of the pass."""
        super().__init__()
        self._parts, self._fields, self._guard, self._layout = parts, fields, guard, layout
        self._number, self._task = number, task

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Draft]:
        part, guard = self._parts[rank], RejectGuard(*self._guard)
        progress = Progress(self._layout, self._number, rank)
        for file, source in enumerate(part.sources, part.first_file):
            for piece in read_pieces(source, file, self._fields):
                guard.admit(source, piece)
                for record in parse_piece(piece, self._fields):
                    if isinstance(record, Document):
                        self._task.counts["bytes"] += len(record.text_bytes)
                        yield Draft(
                            record.text, record.id or f"{source.name}:{record.line}", file=file, line=record.line,
                            others=record.others, source_text=record.text,
                        )  # fmt: skip
                    elif self._number == 0:
                        self._task.rejects.append((source.name, *record))
                    guard.count(source, record)
                progress.add(piece.source_bytes)
            _require_same(source)
        self._task.counts.update(lines=guard.lines, documents=guard.lines - guard.rejects)


def _require_same(source: SourceFile) -> None:
    """Raises BadInput if the file is not what it was when the build began: each pass must read the same."""
    now = source.path.stat()
    if (now.st_size, now.st_mtime_ns) != (source.bytes, source.mtime_ns):
        raise BadInput(
            f"{source.path} changed during the build ({source.bytes} bytes before, {now.st_size} now): sources must "
            "stay as they are until its end; begin again with another --destination_path"
        )


class ReplayStep(PipelineStep):
    """Leaves out the documents that earlier passes removed, and cuts and masks the others as these did.

    What was decided between the passes becomes rows of the ledger here.
    """

    name = "replay"
    type = "source"

    def __init__(self, layout: Layout, number: int, task: Task) -> None:
        super().__init__()
        self._layout, self._number, self._task = layout, number, task

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Draft]:
        edits: dict[tuple[int, int], list[dict[str, Any]]] = {}
        for number in range(self._number):
            table = read_rows(self._layout.of_pass(number, "rows.parquet", rank))
            for key, rows in by_document(table.filter(table["paragraph"].is_valid())):
                edits.setdefault(key, []).extend(rows)
        survivors = Survivors.read(self._layout, self._number - 1, rank)
        fates = Fates.read(self._layout, self._number - 1, rank, len(survivors.places))
        places, index = survivors.places, 0
        for draft in data:
            if index == len(places) or draft.place != places[index]:
                continue
            if (earlier := edits.get((draft.file, draft.line))) is not None:
                _redo(draft, earlier)
            if fates.apply(index, draft, self._task):
                yield draft
            index += 1
        if index != len(places):
            raise RuntimeError(f"part {rank}: {len(places) - index} documents of the pass before were not found again")


def _redo(draft: Draft, rows: list[dict[str, Any]]) -> None:
    masks: dict[int, list[Mask]] = {}
    for row in rows:
        if row["replacement"] is not None:
            masks.setdefault(row["paragraph"], []).append(
                Mask(row["start_byte"], row["length_bytes"], row["replacement"])
            )
    draft.cut(row["paragraph"] for row in rows if row["replacement"] is None)
    if masks:
        draft.mask(masks)


class Progress:
    """Bytes of the sources that a task has read, in a file that the program which started it looks at."""

    def __init__(self, layout: Layout, number: int, rank: int) -> None:
        folder = layout.work / "progress"
        folder.mkdir(exist_ok=True)
        self._file = os.fdopen(open_own(folder / f"{number}-{rank:05d}", os.O_WRONLY | os.O_CREAT), "wb", buffering=0)
        self._bytes = 0

    def add(self, bytes: int) -> None:
        self._bytes += bytes
        os.pwrite(self._file.fileno(), self._bytes.to_bytes(8, "little"), 0)


def bytes_read(layout: Layout, number: int) -> int:
    """Bytes that the tasks of a pass have read so far."""
    folder = layout.work / "progress"
    return sum(int.from_bytes(path.read_bytes(), "little") for path in folder.glob(f"{number}-*"))
