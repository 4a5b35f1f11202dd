"""The state of a run between two steps: how far it is, its records, and how it gets into and out of a checkpoint.

Invariants: step, slot and the totals are the same on every rank and belong to the weights: the same code sets all of
them from a checkpoint, at the program's start (`start`) and at a rollback (`roll_back`). Whatever can be refused about
a checkpoint, its data and the length of the run is refused before the checkpoint is loaded. Only rank 0 has the
records (datapoint log, trackers); each start and each rollback opens them again, as a new attempt.
Costs: `step_done` writes one line; the rest waits for files.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lit_gpt.checkpoint import checkpoint, history
from lit_gpt.checkpoint.memory import NodeMemory
from lit_gpt.checkpoint.record import Checkpoint, checkpoint_name
from lit_gpt.cli import command_line
from lit_gpt.data.loader import PackedDataset, Step
from lit_gpt.datapoints import run_folder
from lit_gpt.datapoints.attempts import lineage, read_attempts, set_damaged_aside
from lit_gpt.datapoints.log import FOLDER, DatapointLog
from lit_gpt.launch.ranks import Ranks
from lit_gpt.train.data_start import DataStart, data_start, told
from lit_gpt.train.equal_ranks import NODE_FOLDERS, require_equal_ranks
from lit_gpt.train.optimizer import require_same_optimizer
from lit_gpt.train.resolve import log_differences
from lit_gpt.train.rollback import Rollback, Rollbacks, last_good, logged_left_out
from lit_gpt.train.run_inputs import RunInputs, open_datapoint_log, slot_facts
from lit_gpt.train.run_length import Progress, RunLength, run_length
from lit_gpt.train.sent_steps import branch_hash
from lit_gpt.train.settings import Settings
from lit_gpt.train.step_guard import SkippedStep, StepGuard
from lit_gpt.train.trackers import Trackers

log = logging.getLogger(__name__)


class RunState:
    """One rank's view of the run: its numbers cover all ranks and all earlier attempts."""

    def __init__(
        self,
        asked: Settings,
        resolved: dict[str, Any],
        repeated: dict[str, Any] | None,
        inputs: RunInputs,
        ranks: Ranks,
        dataset: PackedDataset,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        guard: StepGuard,
        flags: Collection[str],
        memory: NodeMemory | None = None,
    ) -> None:
        """asked: the settings before they were resolved; resolved: the choices made (resolve.resolved_choices);
        repeated: those of the run whose settings.yaml this run repeats, or None; flags: names of the settings that the
        command line gave; memory: the checkpoints in node memory, if there are any."""
        self.step = 0
        """Updates done."""
        self.slot = 0
        """Rows of the present data that are consumed or left out."""
        self.total_rows = 0
        """Rows trained on."""
        self.total_targets = 0
        """Valid targets trained on."""
        self.length: RunLength
        """Where the run and its schedule end; known from `start` on, and again after each rollback."""
        self.rollbacks = Rollbacks(asked)
        self.from_memory = False
        """The step's checkpoint is in node memory only."""
        self.load_s = 0.0
        """Seconds that loading the last checkpoint took."""
        self.trackers: Trackers | None = None
        self.datapoints: DatapointLog | None = None
        self._asked, self._resolved, self._repeated, self._flags = asked, resolved, repeated, flags
        self._slot_facts = slot_facts(dataset, asked)
        self._data_from_step = 0
        self._ended_by: Path | None = None
        self._inputs, self._ranks, self._dataset, self._memory = inputs, ranks, dataset, memory
        self._model, self._optimizer, self._guard = model, optimizer, guard

    def start(self) -> None:
        """Start where --resume says; raises BadInput if that is not possible, or if ranks differ."""
        asked, inputs = asdict(self._asked), self._inputs
        require_equal_ranks(
            {
                **{name: value for name, value in asked.items() if name not in NODE_FOLDERS},
                **{f"resolved {name}": value for name, value in self._resolved.items()},
                **self._slot_facts,
                "validation data set": inputs.val.dataset_id if inputs.val else None,
                "run folder": str(inputs.run_dir.absolute()),
            }
        )
        start = self._find_start()
        self._begin(start)
        if start is not None and self.ended:  # nothing will be trained, so the records stay as they are
            self._ended_by = start.path
            return
        resume = self._asked.resume
        self._open_records(start, goes_back=bool(start and resume and history.goes_back(resume, start, inputs.run_dir)))

    def _find_start(self) -> Checkpoint | None:
        """The checkpoint that --resume names, found and verified by rank 0; None for a fresh start."""
        resume, run_dir = self._asked.resume, self._inputs.run_dir
        if resume is None:
            self._ranks.on_zero("looking into the run folder", lambda: history.refuse_used(run_dir))
            return None
        what = f"finding and verifying the checkpoint of --resume {resume}"
        found = self._in_memory() if resume == "auto" and self._memory is not None else None
        found_and_left_out = self._ranks.on_zero(what, lambda: self._found(resume, found), share=True)
        assert found_and_left_out is not None
        of_zero, left_out = found_and_left_out
        if of_zero is None:
            log.info("no checkpoint in %s: a fresh start", run_dir)
            return None
        self.rollbacks.add(left_out)
        return found or of_zero

    def _in_memory(self) -> Checkpoint | None:
        """The checkpoint in node memory, if that is to be resumed; of each rank the one on its node."""
        run_dir = self._inputs.run_dir
        self._ranks.on_zero("looking at the datapoint log", lambda: set_damaged_aside(run_dir / FOLDER))
        assert self._memory is not None
        return self._memory.find(
            wanted=lambda step: history.is_newer(step, run_dir),
            current=lambda found: history.is_of_history(found, run_dir),
            weights=checkpoint.weights_of(self._model),
        )

    def _found(self, resume: str, in_memory: Checkpoint | None) -> tuple[Checkpoint | None, list[list[int]]]:
        """The checkpoint that `resume` names, and the ranges of slots that rollbacks left out."""
        set_damaged_aside(self._inputs.run_dir / FOLDER)
        found = in_memory or history.find(resume, self._inputs.run_dir)
        if found is None:
            return None, []
        checkpoint.require_model(found, self._inputs.config)
        require_same_optimizer(found, self._asked)
        data = self._data_start(found)
        saved = [] if data.anew else found.facts.get("left_out", [])
        return found, [*saved, *logged_left_out(self._inputs.run_dir, self._slot_facts, data.from_step)]

    def _data_start(self, start: Checkpoint) -> DataStart:
        return data_start(start, self._slot_facts, self._inputs.train[0].tokenizer_fingerprint, self._asked)

    def _begin(self, start: Checkpoint | None) -> None:
        """Take the numbers of a checkpoint, if there is one, and load it."""
        if start is not None:
            data, facts = self._data_start(start), start.facts
            self.step, self.slot, self.total_targets = start.step, data.slot, facts["tokens"]
            self.total_rows = facts.get("rows", facts["slot"])
            self._data_from_step = data.from_step
        self._set_length()
        if start is not None:
            self._load(start, data)

    def _open_records(self, start: Checkpoint | None, *, goes_back: bool = False) -> None:
        """Open the records of the steps after `start`; goes_back: of history."""
        changed = run_folder.changed_settings(start.facts["settings"], asdict(self._asked)) if start else {}
        if self._ranks.fabric.is_global_zero:
            for name, (was, now) in changed.items():
                log.warning("--%s was %r when the checkpoint was saved, and is %r now", name, was, now)
            before = start.facts.get("resolved") if start is not None else self._repeated
            if before is not None:
                log_differences(before, self._resolved)
        self.datapoints = self._ranks.on_zero(
            "opening the datapoint log",
            lambda: open_datapoint_log(
                self._inputs,
                self._asked,
                self._slot_facts,
                start,
                self.rollbacks.left_out,
                data_from_step=self._data_from_step,
                changed_settings=changed,
                allow_changed_data=self._asked.allow_changed_data,
            ),
        )
        self.trackers = self._ranks.on_zero("opening logs and trackers", lambda: self._open_run_folder(goes_back))

    def _tell_other_texts(self, start: Checkpoint) -> None:
        val = self._inputs.val.dataset_id if self._inputs.val else None
        if start.facts.get("val_dataset_id", val) != val:
            log.warning("validation data other than the checkpoint's: val_loss from here on is of other texts")
        now = self._inputs.train[0].add_bos
        if start.facts.get("add_bos", now) != now:
            how = "begin with BOS" if now else "do not begin with BOS"
            log.warning("documents %s here, unlike those that the weights were trained on", how)

    def _set_length(self) -> None:
        done = Progress(self.step, self.total_rows, self.slot, self.rollbacks.left_out)
        what = "finding where the run ends"
        length = self._ranks.on_zero(
            what, lambda: run_length(self._asked, self._flags, self._dataset, done), share=True
        )
        assert length is not None
        self.length = length
        self._resolved = {**self._resolved, "max_steps": length.steps}

    def _load(self, start: Checkpoint, data: DataStart) -> None:
        self.from_memory = self._memory is not None and start.path.parent == self._memory.folder
        began = time.monotonic()
        checkpoint.load(start, self._model, self._optimizer)
        self.load_s = time.monotonic() - began
        if "step_guard" in start.facts:  # an imported model has none
            self._guard.load(start.facts["step_guard"])
        log.info("resumed from %s: step %d, %s rows of the data done", start.path, self.step, f"{self.slot:,}")
        if self._ranks.fabric.is_global_zero:
            self._tell_other_texts(start)
            if data.changed:
                how = "new data from its start on" if data.anew else "the data has changed"
                log.warning("%s: %s", how, told(data.changed))

    def _open_run_folder(self, goes_back: bool) -> Trackers:
        history.tell_left_behind(self._inputs.run_dir)
        asked = asdict(self._asked)
        run_folder.write_settings(self._inputs.run_dir, asked, self._resolved)
        attempt = self.datapoints.attempt if self.datapoints is not None else None
        return Trackers(
            self._inputs.run_dir, self.step, self._asked, asked, attempt, branch=self._branch(), goes_back=goes_back
        )

    def _branch(self) -> str:
        """Differs wherever a step has other numbers than before: see sent_steps."""
        origin = lineage(read_attempts(self._inputs.run_dir / FOLDER))[-1].parent
        facts = {
            **self._slot_facts,
            "data_from_step": self._data_from_step,
            "left_out": self.rollbacks.left_out,
            "steps": self.length.steps,
            "validation data set": self._inputs.val.dataset_id if self._inputs.val else None,
            "origin": origin,  # the checkpoint of another run that it began from
        }
        return branch_hash(self._asked, facts)

    def step_done(self, data: Step, targets: int, digest: int) -> None:
        """Count and record one more update.

        targets, digest: of the step's rows, over all ranks.
        """
        self.step += 1
        self.total_rows += data.rows
        self.total_targets += targets
        left_out = data.first_slot - self.slot
        if left_out:
            log.info("step %d: rows %d to %d are left out", self.step, self.slot, data.first_slot - 1)
        if self.datapoints is not None:
            if left_out:
                self.datapoints.deviation("left_out", self.step, first_slot=self.slot, rows=left_out)
            self.datapoints.append(self.step, data.first_slot, data.rows, targets, digest)
        self.slot = data.first_slot + data.rows

    @property
    def ended(self) -> bool:
        """Whether no step is left."""
        return self.step >= self.length.steps

    def log_finish(self) -> None:
        """Log that the run has reached its end, and the command that exports it."""
        if self._ended_by is None:
            end = self._inputs.run_dir / checkpoint_name(self.step)
            done = f"finished at step {self.step} ({self.length.limit})"
        else:
            end = self._ended_by
            done = f"nothing to train, nothing was written: {end} finished at step {self.step} ({self.length.limit})"
        log.info("%s: %s tokens trained", done, f"{self.total_targets:,}")
        tokenizer = "" if self._asked.tokenizer_path else "TOKENIZER_PATH=... "
        log.info("next: %s%s", tokenizer, command_line("scripts/create.sh", end))

    def checkpoint_facts(self) -> dict[str, Any]:
        """What a checkpoint's run.json holds, paths absolute; the records that it names are on disk on return."""
        inputs, tokenizer = self._inputs, self._asked.tokenizer_path
        mark = self.datapoints.flush_and_fsync() if self.datapoints is not None else None
        device = self._ranks.fabric.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU process"
        return {
            "step": self.step,
            "slot": self.slot,
            "slot_facts": self._slot_facts,
            "data_from_step": self._data_from_step,
            "rows": self.total_rows,
            "tokens": self.total_targets,
            "step_guard": self._guard.state(),
            "left_out": self.rollbacks.left_out,
            "settings": asdict(self._asked),
            "resolved": self._resolved,
            "dataset_id": [store.dataset_id for store in inputs.train],
            "train_data_dir": [str(store.path.resolve()) for store in inputs.train],
            "val_data_dir": str(inputs.val.path.resolve()) if inputs.val else None,
            "val_dataset_id": inputs.val.dataset_id if inputs.val else None,
            "tokenizer_path": str(Path(tokenizer).resolve()) if tokenizer else None,
            "tokenizer_fingerprint": inputs.train[0].tokenizer_fingerprint,
            "add_bos": inputs.train[0].add_bos,
            "world_size": inputs.world.size,
            "datapoint_log": mark._asdict() if mark else None,
            "environment": {**run_folder.environment(), "hardware": f"{inputs.world.size} x {name}"},
        }

    def plan_rollback(self, spikes: list[SkippedStep]) -> Rollback | None:
        """How far to go back for these spikes; None if there is no checkpoint to go back to. No save may be running."""
        first, run_dir = spikes[0].step, self._inputs.run_dir
        to = self._ranks.on_zero(
            "verifying the checkpoint to go back to", lambda: last_good(run_dir, first), share=True
        )
        if to is not None:
            return self.rollbacks.plan(spikes, to, self._data_start(to).slot)
        if self._ranks.fabric.is_global_zero:
            log.warning("step %d: no checkpoint of this run to roll back to: the update is skipped, no more", first)
        return None

    def roll_back(self, rollback: Rollback) -> None:
        """Go back to the rollback's checkpoint; what came after it is left behind, as after a crash."""
        rows = rollback.end_slot - rollback.first_slot
        if self._ranks.fabric.is_global_zero:
            log.warning(
                "the spike at step %d: back from step %d to step %d, rows %d to %d will be left out",
                rollback.spike_step, self.step, rollback.to.step, rollback.first_slot, rollback.end_slot - 1,
            )  # fmt: skip
        if self.datapoints is not None:
            self.datapoints.deviation(
                "rollback", rollback.spike_step, to_step=rollback.to.step, first_slot=rollback.first_slot, rows=rows
            )
        self.close()
        self.rollbacks.add([(rollback.first_slot, rollback.end_slot)])
        self._begin(rollback.to)
        self._open_records(rollback.to)

    def close(self) -> None:
        """Close the records."""
        trackers, datapoints = self.trackers, self.datapoints
        self.trackers = self.datapoints = None
        if trackers is not None:
            trackers.close()
        if datapoints is not None:
            datapoints.close()
