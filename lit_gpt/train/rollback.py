"""Back to a checkpoint from before a spike of the gradient norm, and on without the rows that led to it.

A rollback is a resume within the process, from the newest whole checkpoint of the run's present lineage that is older
than the spike. What it adds is a range of slots: the rows of the spike's step and of those just before it, which the
order passes over from then on (a later epoch reads the same text again, at other slots). The spike itself never enters
the weights: its update was skipped on the device.

Invariants: every rank holds the same ranges, one for each rollback of the run. They are on disk before the first step
after a rollback (in the details of the datapoint log's new attempt), and in every checkpoint from then on, so a run
that is killed at any moment goes on with them.
Costs: nothing until a spike; then a checkpoint is verified and loaded, and the steps since it are done again.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from lit_gpt.checkpoint.checkpoint import Checkpoint
from lit_gpt.checkpoint.history import whole_newest_first
from lit_gpt.datapoints.log import FOLDER, read_attempts
from lit_gpt.train.settings import SpikeSettings
from lit_gpt.train.step_guard import SkippedStep, Verdict

log = logging.getLogger(__name__)


class Rollback(NamedTuple):
    """A decision to go back."""

    spike_step: int
    to: Checkpoint
    begin: int
    """First slot that is left out."""
    end: int
    """The slot after the last that is left out."""


class Rollbacks:
    """Those of one run, earlier parts included, and the policy for the next."""

    def __init__(self, settings: SpikeSettings) -> None:
        self.left_out: list[tuple[int, int]] = []
        """(first slot, slot after the last) of each rollback, by slot."""
        self.exhausted = False
        """A spike came after max_rollbacks of them."""
        self._wanted = settings.spike_policy == "rollback"
        self._most = settings.max_rollbacks
        self._steps = settings.rollback_steps

    def add(self, ranges: Iterable[Sequence[int]]) -> None:
        """Take over ranges of earlier parts of the run, or of a new rollback; one that is known is no second one."""
        self.left_out = sorted({*self.left_out, *((begin, end) for begin, end in ranges)})

    def spikes(self, skipped: Iterable[SkippedStep]) -> list[SkippedStep]:
        """The steps from before which the run should go back; none where the cap is reached, see `exhausted`."""
        found = [entry for entry in skipped if entry.reason == Verdict.SPIKE] if self._wanted else []
        if found and len(self.left_out) >= self._most:
            self.exhausted = True
            return []
        return found

    def plan(self, spikes: Sequence[SkippedStep], to: Checkpoint) -> Rollback:
        """Which rows are left out: up to the last spike's; none from before the checkpoint."""
        first, last = spikes[0], spikes[-1]
        begin = max(to.facts["slot"], first.first_slot - (self._steps - 1) * first.rows)
        return Rollback(first.step, to, begin, last.first_slot + last.rows)


def last_good(run_dir: Path, step: int) -> Checkpoint | None:
    """The newest whole checkpoint from before step `step` that the run in `run_dir` has come through."""
    for found in whole_newest_first(run_dir):
        if found.step < step and found.facts.get("datapoint_log"):  # an imported model has no optimizer's state
            return found
    return None


def logged_ranges(run_dir: Path) -> list[list[int]]:
    """The ranges that the newest attempt of the run in `run_dir` began with: a kill may have come before a save."""
    attempts = read_attempts(run_dir / FOLDER)
    return attempts[-1].details.get("left_out", []) if attempts else []
