"""What a run is at a step's edge: how far it is, the records of how it came there, the way to and from a checkpoint.

Invariants: step, slot and targets are the same on every rank and go with the weights: they are set together from a
checkpoint, at the start of the program (`start`) and where a run goes back (`roll_back`), by the same code. Rank 0
alone has the records (datapoint log, trackers); each beginning opens them anew, as the next attempt.
Costs: `step_done` is a line in the log; the rest waits for files.
"""

from __future__ import annotations

import logging
import time
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from lit_gpt.checkpoint import checkpoint, history
from lit_gpt.checkpoint.checkpoint import Checkpoint
from lit_gpt.data.loader import PackedDataset, Step
from lit_gpt.datapoints import run_folder
from lit_gpt.datapoints.log import DatapointLog
from lit_gpt.launch.world import Fabric, on_rank_zero
from lit_gpt.train.resolve import log_differences
from lit_gpt.train.rollback import Rollback, Rollbacks, last_good, logged_ranges
from lit_gpt.train.run_inputs import Inputs, open_datapoint_log, run_facts
from lit_gpt.train.settings import Settings
from lit_gpt.train.step_guard import SkippedStep, StepGuard
from lit_gpt.train.trackers import Trackers

log = logging.getLogger(__name__)


class RunState:
    """One rank's; `step` updates are done and `slot` rows consumed or left out, over all ranks and earlier parts."""

    def __init__(
        self,
        asked: Settings,
        resolved: dict[str, Any],
        repeated: dict[str, Any] | None,
        inputs: Inputs,
        fabric: Fabric,
        dataset: PackedDataset,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        guard: StepGuard,
    ) -> None:
        """asked: the settings before `auto` and None were resolved; resolved: what became of these (resolve.py);
        repeated: the same of the run whose settings.yaml this one repeats, if it is a repeat."""
        self.step = self.slot = self.targets = 0
        self.rollbacks = Rollbacks(asked)
        self.load_s = 0.0
        """Seconds that loading the last checkpoint took."""
        self.trackers: Trackers | None = None
        self.datapoints: DatapointLog | None = None
        self._settings, self._resolved, self._repeated = asked, resolved, repeated
        self._inputs, self._fabric, self._dataset = inputs, fabric, dataset
        self._model, self._optimizer, self._guard = model, optimizer, guard

    def start(self) -> None:
        """Begin where --resume says."""
        self._begin(self._find_start())

    def _find_start(self) -> Checkpoint | None:
        """What --resume names; rank 0 finds and verifies it for all."""
        resume, run_dir = self._settings.resume, self._inputs.run_dir
        if resume is None:
            on_rank_zero(self._fabric, lambda: history.refuse_used(run_dir))
            return None
        found_and_ranges = on_rank_zero(
            self._fabric, lambda: (history.find(resume, run_dir), logged_ranges(run_dir)), share=True
        )
        assert found_and_ranges is not None
        found, ranges = found_and_ranges
        if found is None:
            log.info("no checkpoint in %s: a fresh start", run_dir)
            return None
        self.rollbacks.add([*found.facts.get("left_out", []), *ranges])
        return found

    def _begin(self, start: Checkpoint | None) -> None:
        """Take over a checkpoint's state, and open the records of what follows it."""
        settings = self._settings
        if start is not None:
            began = time.monotonic()
            checkpoint.load(start, self._model, self._optimizer)
            self.load_s = time.monotonic() - began
            self.step, self.slot, self.targets = start.step, start.facts["slot"], start.facts["tokens"]
            if "step_guard" in start.facts:  # an imported model has none
                self._guard.load(start.facts["step_guard"])
            log.info("resumed from %s: step %d, slot %d", start.path, self.step, self.slot)
            run_folder.log_changes(start.facts["settings"], asdict(settings))
        before = start.facts.get("resolved") if start is not None else self._repeated
        if before is not None:
            log_differences(before, self._resolved)
        self.datapoints = on_rank_zero(
            self._fabric,
            lambda: open_datapoint_log(self._inputs, settings, self._dataset, start, self.rollbacks.left_out),
        )
        self.trackers = on_rank_zero(self._fabric, self._open_run_folder)

    def _open_run_folder(self) -> Trackers:
        history.tell_left_behind(self._inputs.run_dir)
        settings = asdict(self._settings)
        run_folder.write_settings(self._inputs.run_dir, settings, self._resolved)
        return Trackers(self._inputs.run_dir, self.step, self._settings, settings)

    def step_done(self, data: Step, targets: int, digest: int) -> None:
        """One more update, on `targets` of all ranks; it is written down, with the rows left out before it."""
        self.step += 1
        self.targets += targets
        left_out = data.first_slot - self.slot
        if left_out:
            log.info("step %d: rows %d to %d are left out", self.step, self.slot, data.first_slot - 1)
        if self.datapoints is not None:
            if left_out:
                self.datapoints.deviation("left_out", self.step, first_slot=self.slot, rows=left_out)
            self.datapoints.append(self.step, data.first_slot, data.rows, targets, digest)
        self.slot = data.first_slot + data.rows

    def facts(self) -> dict[str, Any]:
        """What a checkpoint's run.json holds; the records that it speaks of are on disk when this returns."""
        mark = self.datapoints.flush_and_fsync() if self.datapoints is not None else None
        device = self._fabric.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU process"
        return {
            "step": self.step,
            "slot": self.slot,
            "tokens": self.targets,
            "step_guard": self._guard.state(),
            "left_out": self.rollbacks.left_out,
            **run_facts(self._inputs, self._settings, self._resolved),
            "datapoint_log": mark._asdict() if mark else None,
            "environment": {**run_folder.environment(), "hardware": f"{self._inputs.world.size} x {name}"},
        }

    def plan_rollback(self, spikes: list[SkippedStep]) -> Rollback | None:
        """How far to go back for these; None where no checkpoint allows it. No save may be running."""
        first, run_dir = spikes[0].step, self._inputs.run_dir
        to = on_rank_zero(self._fabric, lambda: last_good(run_dir, first), share=True)
        if to is not None:
            return self.rollbacks.plan(spikes, to)
        if self._fabric.is_global_zero:
            log.warning("step %d: no checkpoint of this run to roll back to: the update is skipped, no more", first)
        return None

    def roll_back(self, rollback: Rollback) -> None:
        """A resume within the process: what is after the checkpoint is left behind as if a crash had ended it."""
        rows = rollback.end - rollback.begin
        if self._fabric.is_global_zero:
            log.warning(
                "the spike at step %d: back from step %d to step %d, rows %d to %d will be left out",
                rollback.spike_step, self.step, rollback.to.step, rollback.begin, rollback.end - 1,
            )  # fmt: skip
        if self.datapoints is not None:
            self.datapoints.deviation(
                "rollback", rollback.spike_step, to_step=rollback.to.step, first_slot=rollback.begin, rows=rows
            )
        self.close()
        self.rollbacks.add([(rollback.begin, rollback.end)])
        self._begin(rollback.to)

    def close(self) -> None:
        """Close the records."""
        trackers, datapoints = self.trackers, self.datapoints
        self.trackers = self.datapoints = None
        if trackers is not None:
            trackers.close()
        if datapoints is not None:
            datapoints.close()
