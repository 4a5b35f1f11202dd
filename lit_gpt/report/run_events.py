"""What happened to a run besides steps: restarts, branches, rollbacks, skipped updates, rows left out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from lit_gpt.report.blocks import Kind
from lit_gpt.report.goodput import lost_steps
from lit_gpt.report.run_view import RunView

MINOR = ("skipped", "left out")
"""Events of which a run may have thousands."""


class Event(NamedTuple):
    """Something that is marked on the axis."""

    step: int
    attempt: int
    what: str
    said: str
    kind: Kind


def events(view: RunView) -> list[Event]:
    """All of a run, in the order in which they were written."""
    found = [*_attempts(view), *_deviations(view)]
    return sorted(found, key=lambda event: (event.attempt, event.step))


def marked(found: Sequence[Event], most: int) -> list[Event]:
    """At most `most` of the events: starts, rollbacks and branches first; then evenly of the others."""
    if len(found) <= most:
        return list(found)
    major = _spread([event for event in found if event.what not in MINOR], most)
    return [*major, *_spread([event for event in found if event.what in MINOR], most - len(major))]


def _spread(found: Sequence[Event], most: int) -> list[Event]:
    count = min(most, len(found))
    return [found[number * len(found) // count] for number in range(count)]


def _attempts(view: RunView) -> Iterator[Event]:
    rolled = {deviation.attempt for deviation in view.deviations if deviation.kind == "rollback"}
    lost = lost_steps(view)
    for attempt in view.attempts:
        number, parent = attempt.attempt, attempt.parent
        if attempt.details.get("lost"):
            yield Event(0, number, "record lost", "the record of this start was damaged", "bad")
        elif parent is None and (origin := attempt.details.get("resumed_from")):
            yield Event(0, number, "start", f"from {origin}, which has no record", "plain")
        elif parent is None and number:
            yield Event(0, number, "start", "again from nothing", "warning")
        elif parent is not None and not attempt.parent_here:
            yield Event(parent.step, number, "start", f"from step {parent.step:,} of another run", "plain")
        elif parent is not None:
            again = lost[parent.attempt]
            said = f"after step {parent.step:,} of start {parent.attempt}"
            said += f"; {again:,} steps of it are not part of the run any more" if again else ""
            if parent.attempt in rolled and parent.attempt == number - 1:
                yield Event(parent.step, number, "rollback", said, "bad")
            elif parent.attempt < number - 1:
                yield Event(parent.step, number, "branch", said, "warning")
            else:
                yield Event(parent.step, number, "restart", said, "warning" if again else "plain")


def _deviations(view: RunView) -> Iterator[Event]:
    for deviation in view.deviations:
        fields = deviation.fields
        if deviation.kind == "skipped":
            said = f"the update was skipped: {fields.get('reason')}, gradient norm {fields.get('grad_norm')}"
            yield Event(deviation.step, deviation.attempt, "skipped", said, "bad")
        elif deviation.kind == "left_out":
            first, rows = fields.get("first_slot"), fields.get("rows")
            yield Event(deviation.step, deviation.attempt, "left out", f"{rows} rows, from row {first} on", "plain")
        elif deviation.kind != "rollback":  # the start that follows tells it
            yield Event(deviation.step, deviation.attempt, deviation.kind, str(dict(fields)), "warning")
