"""Whether a run lives, and how long it will take: from heartbeats, the last lines of metrics and the last checkpoint.

A rank's watchdog writes its heartbeat at the start, every 15 s at most, and at the end, with how it ended. Ages are
between this machine's clock and the file system's: a clock that is wrong by minutes makes a living run look dead.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

import numpy as np

from lit_gpt.report.metrics import Metrics
from lit_gpt.report.numbers import moment

State: TypeAlias = Literal["empty", "running", "finished", "stopped", "waiting", "gave up", "failed", "dead"]
ENDS: dict[str, State] = {
    "finished": "finished", "stopped": "stopped", "to be requeued": "waiting", "gave up": "gave up",
    "not saved": "failed", "failed": "failed",
}  # fmt: skip
"""The last place that a heartbeat names, of a run that has ended."""
COPIED_S = 300.0
"""A heartbeat's file is so much younger than the heartbeat only in a copied run folder; clocks differ by less."""
SILENT_S = 120.0
"""A heartbeat comes every 15 s at most; a file system may show it a minute later to another node."""
WINDOWS = 8


class Beat(NamedTuple):
    """A rank's last heartbeat."""

    rank: int
    rank_name: str
    step: int
    place: str
    time: float
    """Of the file, seconds since 1970."""


class Life(NamedTuple):
    """What a run is doing."""

    state: State
    said: str
    """How that is known, and since when."""
    last_sign: float | None
    """Seconds since 1970; None before the first."""


class Left(NamedTuple):
    """Seconds until the last step, by the pace of the present attempt."""

    likely_s: float
    low_s: float | None
    """By the fastest and the slowest of WINDOWS equal parts; None where there are too few lines to say."""
    high_s: float | None
    with_stops_s: float | None
    """By the pace of the whole run, stops included; None for a run that was never stopped."""


def read_beats(folder: Path, world_size: int) -> list[Beat]:
    """The heartbeats of a run's first `world_size` ranks, in its watchdog folder."""
    found = []
    for path in [folder / "rank-00000.json"] if world_size == 1 else sorted(folder.glob("rank-*.json")):
        try:
            said = json.loads(path.read_text(encoding="utf-8"))
            written = path.stat().st_mtime  # by the file system's clock, which is one for all nodes
            told = float(said.get("time", written))
            at = told if written - told > COPIED_S else written
            beat = Beat(said["rank"], str(said["who"]), said["step"], str(said["place"]), at)
        except (OSError, ValueError, LookupError, TypeError):  # is being written; the next look sees it
            continue
        if beat.rank < world_size:
            found.append(beat)
    return found


def life_of(
    beats: Sequence[Beat], step: int, max_steps: int | None, saved_at: int | None, line_times: Sequence[float],
    watchdog_floor_s: object, now: float | None = None,
) -> Life:  # fmt: skip
    """saved_at: step of the newest whole checkpoint; line_times: of the last lines of metrics; now: for tests."""
    now = time.time() if now is None else now
    floor_s = watchdog_floor_s if isinstance(watchdog_floor_s, (int, float)) else 0.0
    silent_s = max(SILENT_S, floor_s / 2)
    signs = [*(beat.time for beat in beats), *line_times[-1:]]
    last = max(signs, default=None)
    seen = f"last sign of life {moment(last)}" if last is not None else "no sign of life yet"
    done = max_steps is not None and step >= max_steps and saved_at == step
    if last is None:
        if step and not done:  # of a version whose lines have no time
            return Life("stopped" if saved_at == step else "dead", "its files have no times", None)
        return Life("finished" if done else "empty", seen, None)
    ended = next((beat for beat in beats if beat.rank == 0 and beat.place in ENDS), None)
    if ended is not None and ended.time >= last - 2:  # lines have whole seconds
        return Life(ENDS[ended.place], f"{ended.place}, {seen}", last)
    if done:
        return Life("finished", seen, last)
    if not beats or max(beat.time for beat in beats) < max(line_times[-1:], default=0.0) - silent_s:
        # the watchdog is off, or the run is of an earlier version
        usual_s = line_times[-1] - line_times[-2] if len(line_times) > 1 else 0.0
        if now - last <= max(silent_s, 10 * usual_s):
            return Life("running", seen, last)
        return Life("stopped" if saved_at == step else "dead", seen, last)
    silent = [beat for beat in beats if now - beat.time > silent_s]
    if len(silent) == len(beats):
        return Life("dead", f"{seen}, at {beats[0].place!r}", last)
    if silent:
        names = ", ".join(beat.rank_name for beat in silent[:4])
        return Life("running", f"{seen}; silent: {names}{' and others' if len(silent) > 4 else ''}", last)
    return Life("running", f"{seen}, at {beats[0].place!r}", last)


def time_left(metrics: Metrics, max_steps: int | None, started: float | None) -> Left | None:
    """The time that the rest takes; None where the end or the pace is not known. started: of the first attempt."""
    if max_steps is None or metrics.lines < 3:
        return None
    steps, attempts = metrics.of("step"), metrics.of("attempt")
    present = np.flatnonzero((attempts == attempts[-1]) & np.isfinite(metrics.times))
    if np.isnan(attempts[-1]) or len(present) < 3:
        return None
    present = present[1:]  # what came before the first line is set-up and compilation
    at, when = steps[present], metrics.times[present]
    if at[-1] <= at[0] or when[-1] <= when[0]:
        return None
    to_come = max_steps - at[-1]
    edges = np.unique(np.linspace(0, len(at) - 1, WINDOWS + 1).astype(int))
    paces = np.diff(when[edges]) / np.diff(at[edges])
    recent = present[len(present) // 2 :]
    likely = (metrics.times[recent[-1]] - metrics.times[recent[0]]) / max(1, steps[recent[-1]] - steps[recent[0]])
    tells = len(paces) == WINDOWS and np.diff(when[edges]).min() >= 5  # lines have whole seconds
    whole = (when[-1] - started) / at[-1] if started is not None and attempts[-1] > 0 else None
    low, high = (to_come * float(min(paces.min(), likely)), to_come * float(max(paces.max(), likely)))
    return Left(
        float(likely * to_come), low if tells else None, high if tells else None,
        None if whole is None else float(whole * to_come),
    )  # fmt: skip
