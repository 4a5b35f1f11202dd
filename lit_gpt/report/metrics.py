"""metrics.csv as columns of numbers, for files of a million lines.

Invariants: as run_folder.read_metrics, a line that does not have the header's columns, or whose step is no number,
costs itself and is counted; a value that is no number is NaN.
Costs: a million lines (180 MB) take two seconds and 0.9 GB.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
from numpy.typing import NDArray

from lit_gpt.datapoints.line_log import text_line

Numbers = NDArray[np.float64]
NUMBER = r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$|^[+-]?(nan|inf)$"
_LINE_BYTES = 1 << 26
"""Longer lines are read as damaged ones."""


class Metrics(NamedTuple):
    """The lines of a metrics.csv in their order."""

    columns: dict[str, Numbers]
    """Each column of numbers, of equal lengths; NaN where a line has none."""
    times: Numbers
    """When each line was written, seconds since 1970; NaN where it does not say."""
    damaged: int
    """Lines that were left out."""

    @property
    def lines(self) -> int:
        return len(self.times)

    def of(self, name: str) -> Numbers:
        """A column; NaN everywhere if the file has none of that name."""
        return self.columns.get(name, np.full(self.lines, np.nan))

    def has(self, name: str) -> bool:
        """Whether any line has a number in the column."""
        return bool(np.isfinite(self.of(name)).any())

    def last(self, name: str) -> float | None:
        """The newest number of a column; None where there is none."""
        found = self.of(name)[np.isfinite(self.of(name))]
        return float(found[-1]) if len(found) else None


def read(path: Path, tail_bytes: int | None = None) -> Metrics:
    """The metrics in `path`, or those in its last `tail_bytes`; no line where there is no such file."""
    raw = _text(path, tail_bytes)
    header, _, body = raw.partition(b"\n")
    names = header.decode().strip().split(",")
    if not body or "step" not in names or len(set(names)) < len(names):
        return Metrics({}, np.empty(0), body.count(b"\n"))
    skipped: list[object] = []

    def skip(row: object) -> str:
        skipped.append(row)
        return "skip"

    table = pa.csv.read_csv(
        pa.BufferReader(raw),
        read_options=pa.csv.ReadOptions(use_threads=False, block_size=max(1 << 20, min(len(raw), _LINE_BYTES))),
        parse_options=pa.csv.ParseOptions(quote_char=False, invalid_row_handler=skip),
        convert_options=pa.csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string())),
    )
    columns = {name: _numbers(table.column(name)) for name in names if name != "time"}
    times = _times(table.column("time")) if "time" in names else np.full(table.num_rows, np.nan)
    known = np.isfinite(columns["step"]) & (columns["step"] >= 0) & (columns["step"] % 1 == 0)
    if not known.all():
        columns, times = {name: values[known] for name, values in columns.items()}, times[known]
    return Metrics(columns, times, len(skipped) + int((~known).sum()))


def _text(path: Path, tail_bytes: int | None) -> bytes:
    """The file's whole lines, or its header and those in the last `tail_bytes`."""
    if not path.is_file():  # a pipe would be waited for
        return b""
    with path.open("rb") as file:
        raw = file.readline()
        if tail_bytes is not None and (begin := os.fstat(file.fileno()).st_size - tail_bytes) > len(raw):
            file.seek(begin)
            file.readline()
        raw += file.read()
    if b"\0" in raw or not raw.isascii():
        lines = [text_line(line) for line in raw.splitlines(keepends=True)]
        return "".join(line for line in lines if line is not None).encode()
    return raw[: raw.rfind(b"\n") + 1]


def _numbers(column: pa.ChunkedArray) -> Numbers:
    filled = pc.if_else(pc.equal(column, ""), None, column)
    try:
        numbers = pc.cast(filled, pa.float64())
    except pa.ArrowInvalid:  # something in it is no number
        numbers = pc.cast(pc.if_else(pc.match_substring_regex(filled, NUMBER), filled, None), pa.float64())
    found: Numbers = numbers.to_numpy(zero_copy_only=False).astype(np.float64)
    return found


def _times(column: pa.ChunkedArray) -> Numbers:
    """Seconds since 1970 of texts as 2026-11-27T15:26:49+0000."""
    form = r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4}$"
    filled = pc.if_else(pc.match_substring_regex(column, form), column, None)
    try:
        seconds = pc.cast(pc.cast(filled, pa.timestamp("s", tz="UTC")), pa.int64())
    except pa.ArrowInvalid:  # a 45th of November
        return np.full(len(column), np.nan)
    return pc.cast(seconds, pa.float64()).to_numpy(zero_copy_only=False).astype(np.float64)
