"""Whether a run should stop before its next step: a signal came, or the job is about to end.

The job ends at Slurm's time (job.py) or --time_limit_s after the program's start, whichever is earlier. The run keeps
free twice the longest save, twice the longest step so far, the longest validation and the longest samples where the
next step has them, and --stop_margin_s. Deadlines are on the monotonic clock: setting the system's clock does not move
them.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Collection
from typing import Literal

from lit_gpt.cli import BadInput
from lit_gpt.launch.job import exit_code_after_stop, seconds_left
from lit_gpt.launch.settings import StopSettings
from lit_gpt.launch.signals import StopFlag

log = logging.getLogger(__name__)

Reason = Literal["signal", "time"]
Pause = Literal["validate", "sample"]
"""What the loop may do between two steps that is longer than a step."""


class StopRequest:
    """Whether this rank wants to stop; the ranks agree on it once a step (trainer.py)."""

    def __init__(self, flag: StopFlag, settings: StopSettings) -> None:
        self._flag = flag
        self._margin_s = settings.stop_margin_s
        limit_s = settings.time_limit_s
        ends = [] if limit_s is None else [flag.began + limit_s]
        left_s = seconds_left()
        if left_s is not None:
            ends.append(time.monotonic() + left_s)
        self._ends_at = min(ends, default=float("inf"))
        self._save_s = self._step_s = 0.0
        self._pause_s: dict[Pause, float] = {"validate": 0.0, "sample": 0.0}
        self._step_began: float | None = None
        self._steps = 0
        self._ending = False
        self.agreed: Reason | None = None
        """Why the ranks have agreed to stop; None while they go on."""

    @property
    def signal(self) -> str | None:
        """Name of the first stop signal; None before one comes."""
        return self._flag.received

    def agree(self, signalled: bool, out_of_time: bool) -> None:
        """Record what the ranks have agreed on: whether any has a signal, or is out of time."""
        self.agreed = "signal" if signalled else "time" if out_of_time else None

    def remaining_s(self) -> float:
        """Seconds until the job ends; infinite without a time limit."""
        return self._ends_at - time.monotonic()

    def needed_s(self, pauses: Collection[Pause] = ()) -> float:
        """Seconds that one more step, the pauses after it, a save and the end of the program may take."""
        return self._margin_s + 2 * (self._save_s + self._step_s) + sum(self._pause_s[pause] for pause in pauses)

    def note_save(self, seconds: float) -> None:
        """Record that a save took `seconds`; until the first save, the time that loading took is the estimate."""
        self._save_s = max(self._save_s, seconds)
        self._step_began = None  # a step that a save interrupts is not measured

    def note_pause(self, pause: Pause, seconds: float) -> None:
        """Record that a validation or the samples took `seconds`."""
        self._pause_s[pause] = max(self._pause_s[pause], seconds)
        self._step_began = None

    def out_of_time(self, longest_save_s: float, pauses: Collection[Pause] = ()) -> bool:
        """Whether the next step, the pauses after it and a save do not fit any more; False before the first step.

        The loop calls it once a step, at the same place. longest_save_s: from a save's call to its publication;
        note_save counts only what training waited for.
        """
        self._save_s = max(self._save_s, longest_save_s)
        now = time.monotonic()
        self._steps += 1
        if self._step_began is not None and self._steps > 2:  # the first step also compiles
            self._step_s = max(self._step_s, now - self._step_began)
        self._step_began = now
        return self._steps > 1 and self.remaining_s() <= self.needed_s(pauses)

    def must_save_now(self) -> bool:
        """During a pause: whether the time left is that of a save and the end of the program."""
        return self.remaining_s() <= self._margin_s + 2 * self._save_s

    def answer_while_training(self) -> None:
        """From now on, signals are answered with what the training loop is going to do."""
        self._flag.answer = self._answer

    def note_ending(self) -> None:
        """The run has done its last step."""
        self._ending = True

    def _answer(self, name: str) -> str:
        again = "; again: abort without saving" if name == "SIGINT" else ""
        if self._ending:
            return f"{name}: the run is ending, its last save is done or under way{again}"
        about = f" (about {math.ceil(self._step_s + self._save_s)} s)" if self._step_s else ""
        return f"{name}: saving after this step{about}{again}"

    def refuse_too_short_a_job(self) -> None:
        """Raise BadInput if the job would have to stop before its first step: it would be requeued for ever."""
        if self.remaining_s() <= self.needed_s():
            raise BadInput(
                f"the job ends in {max(self.remaining_s(), 0):.0f} s, of which {self.needed_s():.0f} s are kept free "
                "to save: no step fits. Ask for more time (sbatch --time, --time_limit_s) or lower --stop_margin_s"
            )

    def log_early_stop(self) -> int:
        """Log that a signal came before the first step; returns the program's exit code."""
        log.info("stopped by a signal (%s) before the first step: nothing new to save", self._sender())
        return exit_code_after_stop()

    def log_stop(self, step: int) -> int:
        """Log that the ranks stopped after update number `step` and saved it; returns the program's exit code."""
        if self._steps <= 1:  # no step was done
            return self.log_early_stop()
        why = f"by a signal ({self._sender()})"
        if self.agreed == "time":
            why = f"{self.remaining_s():.0f} s before the job's time limit"
        log.info("stopped %s after step %d, saved: --resume auto goes on", why, step)
        return exit_code_after_stop()

    def _sender(self) -> str:
        return self.signal or "to another rank"
