"""A run's datapoint log as a reader sees it: the steps that led to the present state, over all attempts.

Invariants: the lineage is the newest attempt and its parents; steps that a crash lost, or that the run went back from,
are not part of it, but stay in the file. Torn lines are skipped and counted.
Costs: finding a step, or a slot's step, is a binary search in the file (some 30 short reads); memory holds no steps.
"""

from __future__ import annotations

import json
import mmap
import os
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypedDict

import msgspec

from lit_gpt.cli import BadInput
from lit_gpt.datapoints.attempts import RUN_FILE, Attempt, lineage, read_attempts
from lit_gpt.datapoints.line_log import text_line
from lit_gpt.datapoints.log import STEPS_FILE

_DEVIATION_LINE = re.compile(rb'\{"deviation"[^\n]*\n?')
_TAIL_BYTES = 1 << 16
"""Enough to hold the last step's line, whatever deviations follow it."""


class StepRecord(NamedTuple):
    """What one optimizer step saw: see DatapointLog.append."""

    step: int
    first_slot: int
    rows: int
    targets: int
    digest: int
    attempt: int


_Count = Annotated[int, msgspec.Meta(ge=0)]


class _Step(TypedDict):
    step: _Count
    slot: _Count
    rows: _Count
    targets: _Count
    digest: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{16}$")]
    attempt: _Count


class _Deviation(TypedDict):
    deviation: str
    step: _Count
    attempt: _Count


class LeftOut(NamedTuple):
    """Rows that no step trained on; `step` is the next one."""

    step: int
    first_slot: int
    rows: int


class Segment(NamedTuple):
    """The steps of one attempt that are in the lineage: after < step, and step <= until unless that is None."""

    attempt: Attempt
    after: int
    until: int | None
    begin: int
    end: int
    """Byte range of the attempt's lines."""

    def holds(self, step: int) -> bool:
        return self.after < step and (self.until is None or step <= self.until)

    @property
    def data_from_step(self) -> int:
        """The step after which its data began at slot 0."""
        return self.attempt.data_from_step


class RunRecord:
    """The log of a run, open for reading, also while the run trains. Raises BadInput without a log or its steps."""

    def __init__(self, folder: Path) -> None:
        self.attempts = read_attempts(folder)
        if not self.attempts:
            raise BadInput(f"no datapoint log in {folder}: {RUN_FILE} is missing (is this a run's folder?)")
        self.torn: set[int] = set()
        """Offsets of the torn lines met so far."""
        self._begins = [attempt.begin_bytes for attempt in self.attempts]
        path = folder / STEPS_FILE
        if not path.is_file():
            there = "is no regular file" if path.exists() else "is missing: no step is logged yet, or it was removed"
            raise BadInput(f"{path} {there}")
        self._file = path.open("rb")
        self.lineage = self._trace(os.fstat(self._file.fileno()).st_size)

    def _trace(self, size: int) -> list[Segment]:
        ends = [*self._begins[1:], size]
        segments: list[Segment] = []
        until: int | None = None
        for attempt in lineage(self.attempts):
            after = attempt.parent.step if attempt.parent else 0
            segments.insert(0, Segment(attempt, after, until, attempt.begin_bytes, ends[attempt.attempt]))
            until = after if until is None else min(after, until)
        return segments

    def steps(self, first: int = 1) -> Iterator[StepRecord]:
        """The steps of the lineage from `first` on, in order."""
        for segment in self.lineage:
            begin = self._search(segment, lambda record: record.step >= first)
            for line in self._lines(begin, segment.end):
                if "slot" in line and segment.holds(line["step"]):
                    yield _record(line)

    def deviations(self) -> list[dict[str, Any]]:
        """Every deviation of the lineage, as written."""
        segments = {segment.attempt.attempt: segment for segment in self.lineage}
        return [
            line
            for number, line in self.all_deviations()
            if number in segments and segments[number].holds(line["step"])
        ]

    def all_deviations(self) -> list[tuple[int, dict[str, Any]]]:
        """(attempt, deviation as written) of the whole log, also of steps that are not in the lineage.

        Costs a search of the file for their first letters; steps are not parsed."""
        size = os.fstat(self._file.fileno()).st_size
        if not size:
            return []
        found = []
        with mmap.mmap(self._file.fileno(), size, access=mmap.ACCESS_READ) as content:
            for match in _DEVIATION_LINE.finditer(content):
                line = _parsed(match[0])
                if line is None or content[max(0, match.start() - 1) : match.start()] not in (b"", b"\n"):
                    self.torn.add(match.start())
                else:
                    found.append((bisect_right(self._begins, match.start()) - 1, line))
        return found

    def last_of(self, number: int) -> StepRecord | None:
        """The last step that attempt `number` did, whether or not it is in the lineage; None where it did none."""
        end = [*self._begins, os.fstat(self._file.fileno()).st_size][number + 1]
        return self._last([Segment(self.attempts[number], 0, None, self._begins[number], end)])

    def left_out(self) -> list[LeftOut]:
        """The rows that rollbacks left out of the lineage."""
        return [
            LeftOut(line["step"], line["first_slot"], line["rows"])
            for line in self.deviations()
            if line["deviation"] == "left_out"
        ]

    def step(self, number: int) -> StepRecord | None:
        """The record of step `number`; None where the lineage has none."""
        found = next(self.steps(number), None)
        return found if found and found.step == number else None

    def data_starts(self) -> list[int]:
        """The steps after which data began at slot 0, in order; more than one if the run went on with new data."""
        return sorted({segment.data_from_step for segment in self.lineage})

    def _segments(self, data_from_step: int | None) -> list[Segment]:
        """The segments of one data start; None: of the newest."""
        wanted = self.lineage[-1].data_from_step if data_from_step is None else data_from_step
        return [segment for segment in self.lineage if segment.data_from_step == wanted]

    def step_of(self, slot: int, data_from_step: int | None = None) -> StepRecord | None:
        """The step of the lineage that trained on the row of `slot`; None where none did.

        data_from_step: one of data_starts, whose slots are meant; None: the newest.
        """
        for segment in self._segments(data_from_step):
            begin = self._search(segment, lambda record: record.first_slot + record.rows > slot)
            line = next((line for line in self._lines(begin, segment.end) if "slot" in line), None)
            if line and segment.holds(line["step"]) and line["slot"] <= slot:
                return _record(line)
        return None

    def last(self) -> StepRecord | None:
        """The newest step of the lineage; None where there is none."""
        return self._last(self.lineage)

    def _last(self, segments: list[Segment]) -> StepRecord | None:
        for segment in reversed(segments):
            end = segment.end
            if segment.until is not None:
                end = self._search(segment, partial(_is_after, segment.until))
            for begin in (max(segment.begin, end - _TAIL_BYTES), segment.begin):
                lines = [line for line in self._lines(begin, end) if "slot" in line and segment.holds(line["step"])]
                if lines:
                    return _record(lines[-1])
        return None

    def consumed(self, data_from_step: int | None = None) -> int:
        """The slot after the newest step: rows trained on or left out so far; data_from_step as for step_of."""
        newest = self._last(self._segments(data_from_step))
        return newest.first_slot + newest.rows if newest else 0

    def _search(self, segment: Segment, reached: Callable[[StepRecord], bool]) -> int:
        """Offset from which the segment's next step satisfies `reached`, which is false up to some step, then true."""
        low, high = segment.begin, segment.end
        while low < high:
            middle = (low + high) // 2
            line = next((line for line in self._lines(middle, segment.end) if "slot" in line), None)
            if line is None or reached(_record(line)):
                high = middle
            else:
                low = middle + 1
        return low

    def _lines(self, begin: int, end: int) -> Iterator[dict[str, Any]]:
        """The whole lines that start in [begin, end) of the file."""
        at = begin
        if begin > 0:
            self._file.seek(begin - 1)
            at += len(self._file.readline()) - 1
        while at < end:
            self._file.seek(at)
            raw = self._file.readline()
            if not raw:  # the file is shorter than run.json says
                return
            line = _parsed(raw)
            if line is None:
                self.torn.add(at)
            else:
                yield line
            at += len(raw)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> RunRecord:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _parsed(raw: bytes) -> dict[str, Any] | None:
    """A line of the log; None if it is torn, or not of the form that DatapointLog writes."""
    try:
        line = json.loads(text_line(raw) or "")
        msgspec.convert(line, _Deviation if "deviation" in line else _Step)
    except (ValueError, TypeError, RecursionError):
        return None
    found: dict[str, Any] = line
    return found


def _is_after(step: int, record: StepRecord) -> bool:
    return record.step > step


def _record(line: dict[str, Any]) -> StepRecord:
    return StepRecord(
        line["step"], line["slot"], line["rows"], line["targets"], int(line["digest"], 16), line["attempt"]
    )
