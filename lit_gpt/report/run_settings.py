"""The settings of runs on their page: what differed between the starts of one, and between several."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lit_gpt.report.blocks import Block, Cell, Details, Table, facts
from lit_gpt.report.run_view import RunView

_OF_A_START = ("world_size", "micro_batch_size", "train_data_dir", "tokenizer_path")
"""Details of an attempt that may differ between starts without being a changed setting."""
_PLACES = ("out_dir", "resume")
"""Settings about where a run is or how it started, not what it is."""
_MISSING = object()


def settings_blocks(views: Sequence[RunView]) -> Iterator[Block]:
    """The blocks of the settings section."""
    if len(views) > 1 and (rows := _between_runs(views)):
        yield Table(("setting", *(view.name for view in views)), rows, "settings that differ between the runs")
    for view in views:
        name = f"{view.name}: " if len(views) > 1 else ""
        if rows := list(_between_starts(view)):
            yield Table(("start", "setting", "before", "now"), rows, f"{name}what differed between its starts")
        if view.settings:
            asked = {key: _told(value) for key, value in view.chosen.items()}
            yield Details(f"{name}all settings", facts(asked))
        if view.environment:
            yield Details(f"{name}code, packages and command", facts(_environment(view.environment)))


def _between_runs(views: Sequence[RunView]) -> list[list[object]]:
    chosen = [view.chosen for view in views]
    names = dict.fromkeys(name for values in chosen for name in values)
    return [
        [name, *(_told(values.get(name)) for values in chosen)]
        for name in names
        if name not in _PLACES and any(values.get(name, _MISSING) != chosen[0].get(name, _MISSING) for values in chosen)
    ]


def _between_starts(view: RunView) -> Iterator[list[object]]:
    before: Mapping[str, Any] = {}
    for attempt in view.attempts:
        now = {**attempt.facts, **{name: attempt.details.get(name) for name in _OF_A_START}}
        changed = attempt.details.get("changed_settings")
        told = changed if isinstance(changed, dict) else {}
        for name, pair in told.items():
            was, is_now = pair if isinstance(pair, list) and len(pair) == 2 else (None, pair)
            yield [attempt.attempt, name, _told(was), _told(is_now)]
        for name, value in now.items():
            if before and name not in told and before.get(name) != value:
                yield [attempt.attempt, name, _told(before.get(name)), _told(value)]
        before = now


def _environment(found: Mapping[str, Any]) -> dict[str, object]:
    packages, command = found.get("packages"), found.get("command")
    rows = {name: value for name, value in found.items() if name not in ("packages", "command")}
    if isinstance(command, list):
        rows["command"] = Cell(shlex.join(map(str, command)), code=True)
    return {**rows, **(packages if isinstance(packages, dict) else {})}


def _told(value: object) -> object:
    """As a flag has it."""
    if isinstance(value, list):
        return ", ".join(map(str, value)) or None
    if isinstance(value, bool):
        return str(value).lower()
    return value if value is None else str(value)
