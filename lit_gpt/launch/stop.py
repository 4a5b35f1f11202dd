"""Whether a run should stop at the next step's edge: a signal came, or the job is about to end.

The job's end is Slurm's (job.py) or --time_limit_s after the program's start, whichever is earlier. Time is kept free
for twice the longest save and twice the longest step so far, and --stop_margin_s on top. Deadlines are kept on the
monotonic clock, so a clock that is set does not move them.
"""

from __future__ import annotations

import logging
import time
from typing import Literal

from lit_gpt.cli import BadInput
from lit_gpt.launch.job import exit_code_after_stop, seconds_left
from lit_gpt.launch.settings import StopSettings
from lit_gpt.launch.signals import StopFlag

log = logging.getLogger(__name__)

Reason = Literal["signal", "time"]


class StopRequest:
    """One rank's view; the ranks agree on it once a step."""

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
        self._edge: float | None = None
        self._steps = 0

    @property
    def signal(self) -> str | None:
        """The name of the first stop signal that came."""
        return self._flag.received

    def remaining_s(self) -> float:
        """Until the job ends; infinite where it does not."""
        return self._ends_at - time.monotonic()

    def needed_s(self) -> float:
        """Seconds to be kept free for one more step, its save, and the end of the program."""
        return self._margin_s + 2 * (self._save_s + self._step_s)

    def note_save(self, seconds: float) -> None:
        """A save took `seconds`. Before the first save, the time that loading took is the estimate."""
        self._save_s = max(self._save_s, seconds)
        self._edge = None  # the step that a save interrupts is not a measure

    def out_of_time(self, longest_save_s: float) -> bool:
        """Called at each step's edge: whether the next step and a save would not fit any more.

        longest_save_s: of the saves whose writing went on beside the training, which note_save does not see whole.
        """
        self._save_s = max(self._save_s, longest_save_s)
        now = time.monotonic()
        self._steps += 1
        if self._edge is not None and self._steps > 2:  # the first step also compiles
            self._step_s = max(self._step_s, now - self._edge)
        self._edge = now
        return self.remaining_s() <= self.needed_s()

    def refuse_too_short_a_job(self) -> None:
        """A job that has to stop before its first step would be requeued for ever; raises BadInput."""
        if self.remaining_s() <= self.needed_s():
            raise BadInput(
                f"the job ends in {max(self.remaining_s(), 0):.0f} s, of which {self.needed_s():.0f} s are kept free "
                "to save: no step fits. Ask for more time (sbatch --time, --time_limit_s) or lower --stop_margin_s"
            )

    def tell_early(self) -> int:
        """A signal came before the first step; returns the program's exit code."""
        log.info("stopped by a signal (%s) before the first step: nothing new to save", self._sender())
        return exit_code_after_stop()

    def tell(self, reason: Reason, step: int) -> int:
        """The ranks stopped after this step, and saved it; returns the program's exit code."""
        if reason == "signal":
            log.info("stopped by a signal (%s) after step %d, saved", self._sender(), step)
        else:
            log.info("stopped %.0f s before the job's time limit after step %d, saved", self.remaining_s(), step)
        return exit_code_after_stop()

    def _sender(self) -> str:
        return self.signal or "to another rank"
