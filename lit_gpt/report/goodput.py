"""Where a run's wall time went: the share of it that trained (goodput), and what took the rest.

From the first attempt's start to the last sign of life. Each line of metrics says how long its steps took, how long
they waited for rows and what the pauses took (earlier versions left these out). Steps that were lost and trained again
count at the run's own pace. What no file accounts for is "other".
"""

from __future__ import annotations

from datetime import datetime
from itertools import pairwise

import numpy as np

from lit_gpt.report.metrics import Numbers
from lit_gpt.report.run_view import RunView

TRAINING = "training"
PAUSES = {"validate_s": "validation", "sample_s": "samples", "save_s": "saves"}
"""Column of metrics.csv -> what the training loop waited for."""


def started_s(view: RunView, number: int = 0) -> float | None:
    """When an attempt began, seconds since 1970; None if its record is lost."""
    try:
        return datetime.fromisoformat(view.attempts[number].started).timestamp()
    except (IndexError, ValueError):
        return None


def lost_steps(view: RunView) -> list[int]:
    """Steps of each attempt that a later one trained again, or went back from; none of the newest."""
    lost = [0] * len(view.attempts)
    for attempt in view.attempts:
        parent = attempt.parent
        if parent is None or not attempt.parent_here:
            continue
        last = view.last_steps[parent.attempt] if view.last_steps else None
        if last is not None:
            lost[parent.attempt] = max(lost[parent.attempt], last.step - parent.step)
    return lost


def steps_of_lines(view: RunView) -> Numbers:
    """Steps that each line of metrics is the mean of."""
    steps, attempts = view.metrics.of("step"), view.metrics.of("attempt")
    counts = np.diff(steps, prepend=0.0)
    for at in np.flatnonzero(np.diff(attempts, prepend=np.nan) != 0):  # first lines of attempts
        number = attempts[at]
        if np.isfinite(number) and int(number) < len(view.attempts):
            parent = view.attempts[int(number)].parent
            counts[at] = steps[at] - (parent.step if parent else 0)
    return np.maximum(counts, 0.0)


def goodput(view: RunView) -> dict[str, float]:
    """Seconds by what they went to, the training first; empty where the files do not tell."""
    metrics, begin, end = view.metrics, started_s(view), view.life.last_sign
    if begin is None or end is None or not metrics.has("step_s") or end <= begin:
        return {}
    counts, pace = steps_of_lines(view), metrics.of("step_s")
    stepping, waiting = float(np.nansum(counts * pace)), float(np.nansum(counts * metrics.of("data_wait_s")))
    parts = {TRAINING: stepping - waiting, "waiting for data": waiting}
    parts |= {said: float(np.nansum(metrics.of(name))) for name, said in PAUSES.items() if metrics.has(name)}
    again = lost_steps(view)
    median_s = float(np.nanmedian(pace))
    parts["steps trained again"] = sum(again) * median_s
    setup, between = 0.0, 0.0
    for number in range(len(view.attempts)):
        mine = np.flatnonzero((metrics.of("attempt") == number) & np.isfinite(metrics.times))
        began = started_s(view, number)
        if len(mine) and began is not None:
            first = mine[0]
            pauses = sum(float(np.nan_to_num(metrics.of(name)[first])) for name in PAUSES)
            setup += max(0.0, metrics.times[first] - began - counts[first] * pace[first] - pauses)
    for before, after in pairwise(range(len(view.attempts))):
        mine = np.flatnonzero((metrics.of("attempt") == before) & np.isfinite(metrics.times))
        began = started_s(view, after)
        if len(mine) and began is not None:
            between += max(0.0, began - metrics.times[mine[-1]] - again[before] * median_s)
    parts["set-up and compilation"], parts["stopped"] = setup, between
    found = {name: seconds for name, seconds in parts.items() if seconds > 0}
    other = end - begin - sum(found.values())
    return {**found, "other": other} if other > 0 else found
