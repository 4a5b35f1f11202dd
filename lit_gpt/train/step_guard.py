"""Skips the update of a step whose gradient norm is not finite or is a spike: weights and optimizer state stay.

The device decides, from the global gradient norm. All ranks have the same norm, so they decide alike without
communication, and the host does not wait: it reads the verdicts when it logs or saves (`read`). A skipped step still
counts: step, slot and learning-rate schedule go on.

A verdict is a function of the norms before it. These are the guard's state and are saved in checkpoints, so a resumed
run decides as an uninterrupted one does.
Costs: three kernels on one number a step; with a spike policy also the median of spike_window_steps numbers.
"""

from __future__ import annotations

import logging
import math
from enum import IntEnum
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_gpt.datapoints.log import DatapointLog
from lit_gpt.train.settings import SpikeSettings

log = logging.getLogger(__name__)


class Verdict(IntEnum):
    """Whether a step's update was applied, and if not, why."""

    APPLIED = 0
    NOT_FINITE = 1
    """Some rank's loss or gradient was NaN or infinite."""
    SPIKE = 2
    """The gradient norm was above spike_factor times the median of recent ones."""


class SkippedStep(NamedTuple):
    """A step whose update was skipped; rows: of all ranks, from slot first_slot on."""

    step: int
    first_slot: int
    rows: int
    verdict: Verdict
    grad_norm: float


class _Noted(NamedTuple):
    step: int
    first_slot: int
    rows: int
    verdict: Tensor
    grad_norm: Tensor


class StepGuard:
    """Judges updates one after another; each rank has its own, and all judge the same."""

    def __init__(self, settings: SpikeSettings, device: torch.device) -> None:
        self.skipped = 0
        """Steps of the run whose update was skipped, as of the last `read`."""
        self.gave_up = False
        """max_skipped_steps in a row were skipped, as of the last `read`."""
        self._in_a_row = 0
        self._max_in_a_row = settings.max_skipped_steps
        self._noted: list[_Noted] = []
        self._factor = settings.spike_factor if settings.spike_policy != "none" else None
        # Unfilled places hold infinity: until half of them are filled, the median is infinite, and no norm is a spike.
        self._recent = torch.full((settings.spike_window_steps,), math.inf, device=device)

    @torch.no_grad()
    def judge(self, grad_norm: Tensor) -> Tensor:
        """The Verdict on an update with this global gradient norm (a scalar), as an int64 scalar on the device."""
        finite = grad_norm.isfinite()
        verdict = torch.where(finite, Verdict.APPLIED, Verdict.NOT_FINITE)
        if self._factor is None:
            return verdict
        norm = grad_norm.float()
        verdict = torch.where(finite & (norm > self._factor * self._recent.median()), Verdict.SPIKE, verdict)
        shifted = torch.cat((self._recent[1:], norm.view(1)))
        self._recent = torch.where(verdict == Verdict.APPLIED, shifted, self._recent)
        return verdict

    def note(self, step: int, first_slot: int, rows: int, verdict: Tensor, grad_norm: Tensor) -> None:
        """Keep a step's numbers until its verdict is read."""
        self._noted.append(_Noted(step, first_slot, rows, verdict, grad_norm))

    def read(self) -> list[SkippedStep]:
        """The steps skipped since the last `read`; waits for the device."""
        noted, self._noted = self._noted, []
        if not noted:
            return []
        skipped = []
        verdicts = torch.stack([entry.verdict for entry in noted]).tolist()
        for entry, verdict in zip(noted, verdicts, strict=True):
            if verdict == Verdict.APPLIED:
                self._in_a_row = 0
                continue
            self._in_a_row += 1
            self.gave_up |= self._in_a_row >= self._max_in_a_row
            skipped.append(
                SkippedStep(entry.step, entry.first_slot, entry.rows, Verdict(verdict), entry.grad_norm.item())
            )
        self.skipped += len(skipped)
        return skipped

    def record(self, datapoints: DatapointLog | None) -> list[SkippedStep]:
        """`read`, and write what was skipped to the log and, on rank 0, to the datapoint log."""
        found = self.read()
        for skipped in found:
            reason = skipped.verdict.name.lower()
            log.warning(
                "step %d: update skipped (%s, gradient norm %g, rows %d to %d)",
                skipped.step, reason, skipped.grad_norm, skipped.first_slot, skipped.first_slot + skipped.rows - 1,
            )  # fmt: skip
            if datapoints is not None:
                datapoints.deviation(
                    "skipped", skipped.step, reason=reason, grad_norm=str(skipped.grad_norm),  # JSON has no NaN
                    first_slot=skipped.first_slot, rows=skipped.rows,
                )  # fmt: skip
        return found

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of the guard, as plain JSON; all verdicts must have been read."""
        assert not self._noted
        recent = [norm for norm in self._recent.tolist() if math.isfinite(norm)]
        return {"skipped": self.skipped, "in_a_row": self._in_a_row, "recent_norms": recent}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint's `state`."""
        self.skipped, self._in_a_row, self.gave_up = state["skipped"], state["in_a_row"], False
        recent = state["recent_norms"][-len(self._recent) :]
        self._recent.fill_(math.inf)
        if recent:
            self._recent[-len(recent) :] = torch.tensor(recent, dtype=torch.float32)
