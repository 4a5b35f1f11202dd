"""A run that hangs ends with the stacks of all ranks and the name of the rank at fault, not at the job's time limit.

Each rank has a thread that looks at the training loop every few seconds. A step that takes watchdog_factor times the
usual, and more than watchdog_floor_s, is a stall: one rank waits for ever, and so do the others, in a collective. Each
rank then writes its Python stacks to <run folder>/watchdog, and all end. Heartbeat files there tell which rank is at
fault: a stopped or dead rank, or one whose thread cannot run, no longer writes its own, and a late one has not come to
the collective.

Costs: the loop sets an attribute at each place, and reads no clock; the thread writes a line of 200 bytes a poll.
Files' ages are compared by the file system's clock, so nodes need not agree on the time. A job that Slurm suspends and
resumes has not stalled: the thread sees that it was stopped itself.
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
from pathlib import Path
from typing import NamedTuple

from lit_gpt.cli import EXIT_FAILURE
from lit_gpt.launch.job import ask_for_requeue, exit_code_after_stall
from lit_gpt.launch.settings import WatchdogSettings
from lit_gpt.launch.world import dump_collectives

log = logging.getLogger(__name__)

LONG_PLACES = ("set-up", "validate", "sample", "save", "rollback", "close")
WAITING_PLACE = "agree"
"""Where ranks wait for each other on the host: a rank that hangs is somewhere else, unless it was stopped there."""
MAX_POLL_S = 15.0


def poll_s(settings: WatchdogSettings) -> float:
    """Seconds between two looks of a rank's thread."""
    return min(MAX_POLL_S, settings.watchdog_floor_s / 20)


def limit_s(settings: WatchdogSettings, place: str, steps_done: int, usual_s: float) -> float:
    """Seconds that a step which is at `place` may take."""
    if place in LONG_PLACES or steps_done < 2:
        return max(settings.watchdog_long_s, settings.watchdog_floor_s)
    return max(settings.watchdog_floor_s, settings.watchdog_factor * usual_s)


class Heartbeat(NamedTuple):
    """What one rank last said of itself."""

    rank: int
    who: str
    step: int
    place: str
    silent_s: float = 0.0


class Watchdog:
    """Watches this process until `close`; `at` and `step_done` are called by the training loop."""

    def __init__(self, folder: Path, who: str, rank: int, world_size: int, settings: WatchdogSettings) -> None:
        """`who` names the rank for people."""
        self._folder, self._who, self._rank, self._world_size = folder, who, rank, world_size
        self._settings = settings
        self._poll_s = poll_s(settings)
        self._place, self._steps_done, self._step = "set-up", 0, 0
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        if settings.watchdog_factor > 0:
            folder.mkdir(exist_ok=True)
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()

    def at(self, place: str) -> None:
        """The loop is in this part of the step from now on."""
        self._place = place

    def step_done(self, step: int) -> None:
        self._step = step
        self._steps_done += 1
        self._place = "data"

    def close(self) -> None:
        """Stop watching. It does not return where a stall is being told: then the thread ends the process."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join()

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
            usual_s = statistics.median(recent) if recent else 0.0
            allowed_s = limit_s(self._settings, self._place, steps, usual_s)
            if now - since > allowed_s and steps == self._steps_done:
                self._stalled(now - since, allowed_s, usual_s)

    def _beat(self, *, warn: bool) -> bool:
        """Write this rank's heartbeat; False where the run folder does not take it, which must not end a run."""
        line = json.dumps({"rank": self._rank, "who": self._who, "step": self._step, "place": self._place})
        try:
            (self._folder / f"rank-{self._rank:05d}.json").write_text(line + "\n")
        except OSError as error:
            if warn:
                log.warning("the watchdog of %s cannot write to %s: %s", self._who, self._folder, error.strerror)
            return False
        return True

    def _stalled(self, seconds: float, allowed_s: float, usual_s: float) -> None:
        stacks = self._folder / f"stacks-rank-{self._rank:05d}.txt"
        log.error(
            "watchdog: %s has been in step %d for %.0f s, at %r (limit %.0f s, usual %.2f s): stacks in %s",
            self._who, self._step + 1, seconds, self._place, allowed_s, usual_s, stacks,
        )  # fmt: skip
        code = EXIT_FAILURE
        try:
            with stacks.open("a") as file:
                file.write(f"\n{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {self._who}, step {self._step + 1}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            dump_collectives(self._folder, self._rank)
            if self._is_worth_a_requeue():
                code = exit_code_after_stall()
                ask_for_requeue()
            time.sleep(3 * self._poll_s)  # peers, whose threads look a little later, write theirs
            self._blame()
        except OSError as error:
            faulthandler.dump_traceback(all_threads=True)
            log.error("watchdog: %s cannot write to %s: %s", self._who, self._folder, error.strerror)
        finally:
            for handler in logging.getLogger().handlers:
                handler.flush()
            os._exit(code)  # the main thread hangs, and would hang in any orderly end

    def _is_worth_a_requeue(self) -> bool:
        """A run that took no step, or that stalled from the same checkpoint before, would be requeued for ever."""
        record = self._folder / f"stalled-rank-{self._rank:05d}.txt"
        started_from = str(self._step - self._steps_done)
        again = record.exists() and record.read_text() == started_from
        record.write_text(started_from)
        if again or not self._steps_done:
            log.error("watchdog: no requeue: no step since the start, or the second stall from step %s", started_from)
        return self._steps_done > 0 and not again

    def _blame(self) -> None:
        """The last line: told by the first rank that still speaks, after the others have ended."""
        beats = read_heartbeats(self._folder, self._world_size, self._rank)
        silent_after_s = max(8 * self._poll_s, self._settings.watchdog_floor_s / 2)
        speakers = [beat.rank for beat in beats if beat.silent_s <= silent_after_s]
        if self._rank == min([*speakers, self._rank]):
            time.sleep(min(1.0, self._poll_s))
            log.error("watchdog: %s", verdict(beats, silent_after_s))


def read_heartbeats(folder: Path, world_size: int, reader: int) -> list[Heartbeat]:
    """Every rank's last heartbeat, aged by the file system's clock against the reader's own, which is fresh."""
    now = (folder / f"rank-{reader:05d}.json").stat().st_mtime
    beats = []
    for rank in range(world_size):
        path = folder / f"rank-{rank:05d}.json"
        try:
            silent_s = max(0.0, now - path.stat().st_mtime)
            beats.append(Heartbeat(**json.loads(path.read_text()), silent_s=silent_s))
        except (FileNotFoundError, json.JSONDecodeError):  # never written, or stopped in the middle of it
            beats.append(Heartbeat(rank, f"rank {rank}", -1, "unknown", float("inf")))
    return beats


def verdict(beats: list[Heartbeat], silent_after_s: float) -> str:
    """Which rank is at fault, as far as the heartbeats tell."""
    silent = [beat for beat in beats if beat.silent_s > silent_after_s]
    if silent:
        names = "; ".join(f"{beat.who}, silent for {beat.silent_s:.0f} s at {beat.place!r}" for beat in silent)
        return f"at fault: {names}. The process is stopped or gone, or its node is"
    behind = [beat for beat in beats if beat.step < max(other.step for other in beats)]
    waiting = [beat for beat in beats if beat.place == WAITING_PLACE]
    late = behind or ([beat for beat in beats if beat not in waiting] if waiting else [])
    if late:
        names = "; ".join(f"{beat.who}, at {beat.place!r} of step {beat.step + 1}" for beat in late)
        return f"at fault: {names}, for which the others wait"
    return "all ranks hang at the same place: the stacks and the recording of collectives tell more"
