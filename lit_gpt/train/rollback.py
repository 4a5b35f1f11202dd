"""Go back to a checkpoint from before a spike of the gradient norm, and go on without the rows that led to it.

A rollback is a resume within the process, from the newest whole checkpoint of the run's own lineage that is older than
the spike. In addition it leaves out a range of slots: the rows of the spike's step and of the steps just before it.
(A later epoch reads the same text again, in other slots.) The spike itself never reaches the weights: its update was
skipped on the device.

Invariants: every rank holds the same ranges, one for each rollback. They are on disk before the first step after a
rollback (in the details of the datapoint log's new attempt) and in every later checkpoint, so a run that is killed at
any moment goes on with them.
Costs: nothing until a spike; then a checkpoint is verified and loaded, and the steps since it are repeated.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lit_gpt.checkpoint.history import whole_newest_first
from lit_gpt.checkpoint.record import Checkpoint
from lit_gpt.datapoints.attempts import read_attempts
from lit_gpt.datapoints.log import FOLDER
from lit_gpt.train.settings import SpikeSettings
from lit_gpt.train.step_guard import SkippedStep, Verdict

log = logging.getLogger(__name__)


class Rollback(NamedTuple):
    """How far to go back, and which slots to leave out."""

    spike_step: int
    """Step of the first spike."""
    to: Checkpoint
    first_slot: int
    """First slot that is left out."""
    end_slot: int
    """The slot after the last that is left out."""


class Rollbacks:
    """The rollbacks of one run, earlier attempts included, and whether there may be another."""

    def __init__(self, settings: SpikeSettings) -> None:
        self.left_out: list[tuple[int, int]] = []
        """(first slot, slot after the last) of each rollback, in the order of slots."""
        self.exhausted = False
        """A spike came after max_rollbacks rollbacks."""
        self._settings = settings

    def add(self, ranges: Iterable[Sequence[int]]) -> None:
        """Add the ranges of earlier attempts or of a new rollback; a range that is there already counts once."""
        self.left_out = sorted({*self.left_out, *((first_slot, end_slot) for first_slot, end_slot in ranges)})

    def spikes(self, skipped: Iterable[SkippedStep]) -> list[SkippedStep]:
        """The spikes to roll back from; none without the policy, or after max_rollbacks (then `exhausted` is set)."""
        wanted = self._settings.spike_policy == "rollback"
        found = [entry for entry in skipped if entry.verdict == Verdict.SPIKE] if wanted else []
        if found and len(self.left_out) >= self._settings.max_rollbacks:
            self.exhausted = True
            return []
        return found

    def plan(self, spikes: Sequence[SkippedStep], to: Checkpoint, slot: int) -> Rollback:
        """A rollback to `to`, after which the data goes on at `slot`: leaves out the rows of rollback_steps steps up to
        the first spike, and on to the last.

        Rows from before the checkpoint stay.
        """
        first, last = spikes[0], spikes[-1]
        first_slot = max(slot, first.first_slot - (self._settings.rollback_steps - 1) * first.rows)
        return Rollback(first.step, to, first_slot, last.first_slot + last.rows)


def last_good(run_dir: Path, step: int) -> Checkpoint | None:
    """The newest whole checkpoint of the run's own lineage in `run_dir` from before step `step`."""
    for found in whole_newest_first(run_dir):
        if found.step < step and found.facts.get("datapoint_log"):  # an imported model has no optimizer's state
            return found
    return None


def logged_left_out(run_dir: Path, slot_facts: Mapping[str, Any], data_from_step: int) -> list[list[int]]:
    """The ranges that the newest attempt began with, if it read the same data; after a kill they may not be in any
    checkpoint yet."""
    attempts = read_attempts(run_dir / FOLDER)
    if not attempts or (dict(attempts[-1].facts), attempts[-1].data_from_step) != (slot_facts, data_from_step):
        return []
    return attempts[-1].details.get("left_out", [])
