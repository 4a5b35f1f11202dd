"""A run that hangs is ended long before the job's time limit, with all ranks' stacks and the name of the rank at fault.

A thread of each rank looks at the training loop every few seconds. A step stalls if it takes more than watchdog_factor
times the median of recent steps, and more than watchdog_floor_s: usually one rank hangs, and the others wait for it in
a collective. Each rank then writes its Python stacks to <run folder>/watchdog and exits. Heartbeat files there show
the rank at fault: a rank that is stopped or dead, or whose thread cannot run, no longer writes its file; a rank that is
late has not reached the collective.

Costs: the loop sets an attribute at each place and reads no clock; the thread writes 200 bytes at each look.
Heartbeats are as old as the file system's clock says, so the nodes' clocks may differ. A job that Slurm suspends and
resumes has not stalled: the thread notices that it was stopped itself.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, NoReturn

from lit_gpt.cli import EXIT_FAILURE, EXIT_GAVE_UP, EXIT_NOT_SAVED, EXIT_REQUEUE
from lit_gpt.files import rewrite
from lit_gpt.launch.job import ask_for_requeue, exit_code_after_stall
from lit_gpt.launch.settings import WatchdogSettings
from lit_gpt.launch.stacks import stacks_file, write_stacks
from lit_gpt.launch.world import dump_collectives

log = logging.getLogger(__name__)

LONG_PLACES = ("set-up", "validate", "sample", "save", "rollback", "close")
WAITING_PLACE = "agree"
"""Where ranks wait for each other on the host: a rank that hangs is at another place, unless it was stopped there."""
FOR_RANK_ZERO = "waiting for rank 0"
"""Where ranks wait while rank 0 works for all, within a long place."""
MAX_POLL_S = 15.0
_ENDS = {EXIT_NOT_SAVED: "not saved", EXIT_GAVE_UP: "gave up", EXIT_REQUEUE: "to be requeued"}
_WITHIN = ": "


def poll_s(settings: WatchdogSettings) -> float:
    """Seconds between two looks of the thread."""
    return min(MAX_POLL_S, settings.watchdog_floor_s / 20)


def limit_s(settings: WatchdogSettings, place: str, steps_done: int, median_s: float) -> float:
    """Seconds that a step may take while it is at `place`.

    steps_done: of this process; median_s: seconds of a recent step.
    """
    if place.split(_WITHIN)[0] in LONG_PLACES or steps_done < 2:
        return settings.longest_s
    return max(settings.watchdog_floor_s, settings.watchdog_factor * median_s)


def how_ended(code: int, *, finished: bool) -> str:
    """The last place of a run that ends with this exit code: report/life.py reads it."""
    return _ENDS.get(code, "finished" if finished else "stopped")


class Heartbeat(NamedTuple):
    """What a rank's thread last wrote."""

    rank: int
    rank_name: str
    """As world.rank_name gives it."""
    step: int
    """Updates done."""
    place: str
    """Part of the step that the loop was in."""
    silent_s: float = 0.0
    """Age of the file."""


class Watchdog:
    """Watches this process until `close`; the training loop calls `at` and `step_done`."""

    def __init__(self, folder: Path, rank_name: str, rank: int, world_size: int, settings: WatchdogSettings) -> None:
        self._folder, self._rank_name, self._rank, self._world_size = folder, rank_name, rank, world_size
        self._settings = settings
        self._poll_s = poll_s(settings)
        self._place, self._steps_done, self._step = "set-up", 0, 0
        self.on_stall: Callable[[], None] = lambda: None
        """Called before a stalled process writes what it knows, and ends."""
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        if settings.watchdog_factor > 0:
            folder.mkdir(exist_ok=True)
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()

    def at(self, place: str) -> None:
        """The loop enters this part of the step."""
        self._place = place

    @contextmanager
    def within(self, part: str) -> Iterator[None]:
        """In this context the loop is in a part of its present place."""
        place = self._place
        self._place = f"{place}{_WITHIN}{part}"
        try:
            yield
        finally:
            self._place = place

    @property
    def longest_s(self) -> float:
        """Seconds that the long places may take."""
        return self._settings.longest_s

    def where(self) -> tuple[int, str]:
        """Updates done, and the part of the step that the loop is in."""
        return self._step, self._place

    def start_from(self, step: int) -> None:
        """Training goes on after so many updates."""
        self._step = step

    def step_done(self, step: int) -> None:
        self._step = step
        self._steps_done += 1
        self._place = "data"

    def close(self) -> None:
        """Stop watching, and leave a last heartbeat: its place says how the run ended, if the loop told that by `at`.

        Does not return while a stall is being reported: the thread then ends the process."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join()
            self._beat(warn=True)
            self._thread = None

    def _watch(self) -> None:
        recent = deque[float](maxlen=64)
        since = looked = time.monotonic()
        seen, can_write = 0, True
        while not self._closed.wait(self._poll_s):
            now = time.monotonic()
            stopped_s = now - looked - self._poll_s
            if stopped_s > self._settings.watchdog_floor_s / 2:
                since += stopped_s
            looked = now
            steps = self._steps_done
            if steps != seen:
                recent.append((now - since) / (steps - seen))
                since, seen = now, steps
            can_write = self._beat(warn=can_write)
            median_s = statistics.median(recent) if recent else 0.0
            allowed_s = limit_s(self._settings, self._place, steps, median_s)
            if now - since > allowed_s and steps == self._steps_done:
                self._end_stalled(now - since, allowed_s, median_s)

    def _beat(self, *, warn: bool) -> bool:
        """Write this rank's heartbeat; False if the run folder cannot be written, which must not end a run."""
        said = {"rank": self._rank, "who": self._rank_name, "step": self._step, "place": self._place}
        line = json.dumps(said | {"time": round(time.time(), 1)})
        path = self._folder / f"rank-{self._rank:05d}.json"
        written = path.with_suffix(".new")
        try:
            rewrite(written, line.encode() + b"\n")
            os.replace(written, path)  # so that a rank that is stopped in between leaves a whole heartbeat
        except OSError as error:
            if warn:
                log.warning("the watchdog of %s cannot write to %s: %s", self._rank_name, self._folder, error.strerror)
            return False
        return True

    def _end_stalled(self, seconds: float, allowed_s: float, median_s: float) -> NoReturn:
        """Write this rank's stacks, name the rank at fault and end the process."""
        self.on_stall()
        stacks = stacks_file(self._folder, self._rank)
        log.error(
            "watchdog: %s has been in step %d for %.0f s, at %r (limit %.0f s, median %.2f s): stacks in %s",
            self._rank_name, self._step + 1, seconds, self._place, allowed_s, median_s, stacks,
        )  # fmt: skip
        code = EXIT_FAILURE
        try:
            write_stacks(self._folder, self._rank, f"{self._rank_name}, step {self._step + 1}", dump_collectives)
            code = self.code_after_stall()
            time.sleep(3 * self._poll_s)  # for the other ranks, whose threads look a little later
            self._blame()
        except OSError as error:
            faulthandler.dump_traceback(all_threads=True)
            log.error("watchdog: %s cannot write to %s: %s", self._rank_name, self._folder, error.strerror)
        finally:
            for handler in logging.getLogger().handlers:
                handler.flush()
            os._exit(code)  # the main thread hangs: an orderly end would hang too

    def code_after_stall(self) -> int:
        """The exit code of a process that a stall ends; asks for a requeue where another start may help."""
        if not self._is_worth_a_requeue():
            return EXIT_FAILURE
        ask_for_requeue()
        return exit_code_after_stall()

    def _is_worth_a_requeue(self) -> bool:
        """False if no step was done, or an earlier stall had the same start: the run would be requeued for ever."""
        record = self._folder / f"stalled-rank-{self._rank:05d}.txt"
        started_from = str(self._step - self._steps_done)
        again = record.exists() and record.read_text() == started_from
        rewrite(record, started_from.encode())
        if again or not self._steps_done:
            log.error("watchdog: no requeue: no step since the start, or the second stall from step %s", started_from)
        return self._steps_done > 0 and not again

    def _blame(self) -> None:
        """Name the rank at fault in the log's last line. The lowest rank alive does it, after the others exited."""
        silent_after_s = max(8 * self._poll_s, self._settings.watchdog_floor_s / 2)
        lower = read_heartbeats(self._folder, self._rank, self._rank)
        if any(beat.silent_s <= silent_after_s for beat in lower):  # mostly rank 0, and no more files are read
            return
        beats = [*read_heartbeats(self._folder, self._world_size, self._rank)]
        time.sleep(min(1.0, self._poll_s))
        log.error("watchdog: %s", find_fault(beats, silent_after_s))


def read_heartbeats(folder: Path, ranks: int, reader: int) -> Iterator[Heartbeat]:
    """The last heartbeats of the first `ranks` ranks, each read when it is asked for; silent_s is its age against the
    file of rank `reader`, which was just written."""
    now = (folder / f"rank-{reader:05d}.json").stat().st_mtime
    for rank in range(ranks):
        path = folder / f"rank-{rank:05d}.json"
        try:
            silent_s = max(0.0, now - path.stat().st_mtime)
            said = json.loads(path.read_text())
            beat = Heartbeat(said["rank"], said["who"], said["step"], said["place"], silent_s)
        except (FileNotFoundError, json.JSONDecodeError):  # never written, or damaged by a disk
            beat = Heartbeat(rank, f"rank {rank}", -1, "unknown", float("inf"))
        yield beat


def find_fault(beats: list[Heartbeat], silent_after_s: float) -> str:
    """Which rank is at fault, as far as the heartbeats show; older than silent_after_s, a rank counts as silent."""
    silent = [beat for beat in beats if beat.silent_s > silent_after_s]
    if silent:
        names = "; ".join(f"{beat.rank_name}, silent for {beat.silent_s:.0f} s at {beat.place!r}" for beat in silent)
        return f"at fault: {names}. The process was stopped or killed, or its node is gone"
    behind = [beat for beat in beats if beat.step < max(other.step for other in beats)]
    waiting = [beat for beat in beats if beat.place.endswith((WAITING_PLACE, FOR_RANK_ZERO))]
    late = behind or ([beat for beat in beats if beat not in waiting] if waiting else [])
    if late:
        names = "; ".join(f"{beat.rank_name}, at {beat.place!r} of step {beat.step + 1}" for beat in late)
        return f"at fault: {names}, for which the others wait"
    return "all ranks hang at the same place: see the stacks and the recording of collectives"
