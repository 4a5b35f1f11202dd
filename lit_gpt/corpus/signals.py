"""The stage quality_signals: limits for numbers that were published with the documents.

A signal is a field of the record itself, such as `perplexity`; an entry of its field `quality_signals`, an object or
its JSON; or, as RedPajama-V2 has them, an entry of another file, quality_signals/.../de_head.signals.json.gz, whose
lines are those of documents/.../de_head.json.gz. There a value is [[0, characters, value]]; null breaks no limit.
Costs: parsing the signals, 10 to 20 KB a document of RedPajama-V2.
"""

from __future__ import annotations

import gzip
import math
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from datatrove.pipeline.base import PipelineStep

from lit_gpt.cli import BadInput
from lit_gpt.corpus.draft import Draft
from lit_gpt.corpus.filter_step import Limit
from lit_gpt.corpus.settings import SignalSettings, signal_limit
from lit_gpt.corpus.task import Task

STAGE = "quality_signals"


class SignalStep(PipelineStep):
    """A document goes by the first limit that it breaks. Raises BadInput if it lacks a signal."""

    name = "signals"
    type = "filter"

    def __init__(self, settings: SignalSettings, source_names: list[str], task: Task) -> None:
        super().__init__()
        asked = [(*signal_limit("min_signals", words), True) for words in settings.min_signals]
        asked += [(*signal_limit("max_signals", words), False) for words in settings.max_signals]
        self._limits = [Limit(STAGE, signal, limit, least, 2 * limit) for signal, limit, least in asked]
        self._folder, self._names, self._task = settings.signals_path, source_names, task
        self._values: dict[str, list[float]] = {limit.measure: [] for limit in self._limits}

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Draft]:
        published = _Published(Path(self._folder), self._names) if self._folder else None
        for draft in data:
            others = draft.others or {}
            own = _object(others.get(STAGE) or {}, f"{self._where(draft)}: {STAGE}")
            both = {**others, **own, **(published.of(draft) if published else {})}
            if self._keeps(draft, both):
                yield draft
        for signal, values in self._values.items():
            end = max(limit.drawn for limit in self._limits if limit.measure == signal)
            if end > 0:  # a histogram begins at 0
                self._task.measure(signal, np.maximum(values, 0), end)

    def _where(self, draft: Draft) -> str:
        return f"{self._names[draft.file]} line {draft.line}"

    def _keeps(self, draft: Draft, signals: Mapping[str, Any]) -> bool:
        numbers = {signal: _number(signals, signal, self._where(draft)) for signal in self._values}
        for signal, number in numbers.items():
            if number is not None:
                self._values[signal].append(number)
        for limit in self._limits:
            value = numbers[limit.measure]
            if value is not None and limit.is_broken_by(value):
                self._task.remove(draft, STAGE, limit.rule, value, limit.threshold)
                return False
        return True


def _number(signals: Mapping[str, Any], name: str, where: str) -> float | None:
    if name not in signals:
        raise BadInput(f"{where}: no signal {name}; there are {', '.join(sorted(signals)) or 'none'}")
    value = signals[name]
    if isinstance(value, list):
        if len(value) != 1 or not isinstance(value[0], list) or len(value[0]) != 3:
            raise BadInput(f"{where}: signal {name} has no one value for the document")
        value = value[0][2]
    if value is not None and not (isinstance(value, (int, float)) and math.isfinite(value)):
        raise BadInput(f"{where}: signal {name} is {value!r}, which is no number")
    return value


def _object(value: Any, where: str) -> dict[str, Any]:
    """value: an object, or its JSON; raises BadInput for anything else."""
    try:
        found = orjson.loads(value) if isinstance(value, (str, bytes)) else value
    except orjson.JSONDecodeError as error:
        raise BadInput(f"{where} is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise BadInput(f"{where} is no object of JSON")
    return found


def signals_file(folder: Path, name: str) -> Path:
    """Where RedPajama-V2 has the signals of the documents' file of that name."""
    stem, json_, rest = name.partition(".json")
    return folder / f"{stem}.signals{json_}{rest}"


class _Published:
    """The signals of one document after the other, read along the files of the documents."""

    def __init__(self, folder: Path, names: list[str]) -> None:
        self._folder, self._names = folder, names
        self._file = -1
        self._line = 0
        self._lines: Iterator[bytes] = iter(())

    def of(self, draft: Draft) -> dict[str, Any]:
        path = signals_file(self._folder, self._names[draft.file])
        if draft.file != self._file:
            self._file, self._line, self._lines = draft.file, 0, _lines_of(path)
        found = next(islice(self._lines, draft.line - self._line - 1, None), None)
        self._line = draft.line
        if found is None:
            raise BadInput(f"{path} has no line {draft.line}: it does not belong to {self._names[draft.file]}")
        record = _object(found, f"{path} line {draft.line}")
        if not str(record.get("id", "")).endswith(f"/{draft.line - 1}"):
            raise BadInput(f"{path} line {draft.line} is of document {record.get('id')}, not of line {draft.line}")
        return _object(record.get(STAGE), f"{path} line {draft.line}: {STAGE}")


def _lines_of(path: Path) -> Iterator[bytes]:
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            yield from file
    except (OSError, EOFError) as error:
        raise BadInput(f"cannot read the signals {path}: {getattr(error, 'strerror', None) or error}") from None
