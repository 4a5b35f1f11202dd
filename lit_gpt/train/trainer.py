"""The training loop of one rank: model, optimizer and checkpoint (`Trainer`), then the steps (`Trainer.run`).

The state of a run is its step and its slot (run_state.py). All else is a function of these and the settings, so a
resumed run repeats an uninterrupted one. A rollback after a spike (rollback.py) leaves the loop over steps and enters
it again, as a resume does.

Once a step, before the forward pass, the ranks agree by one sum of integers on the host (agreement.py). A stop
saves before anything else: no further step is done, and a validation or samples that it meets are left. The host waits
for the GPU at logs and saves.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from lit_gpt.checkpoint.checkpoint import unwrapped
from lit_gpt.checkpoint.record import checkpoint_name
from lit_gpt.checkpoint.saver import CheckpointSaver
from lit_gpt.cli import EXIT_GAVE_UP, EXIT_NOT_SAVED
from lit_gpt.data.loader import StepLoader
from lit_gpt.launch.lifeline import Line
from lit_gpt.launch.ranks import Ranks
from lit_gpt.launch.start_phases import StartPhases
from lit_gpt.launch.stop import StopRequest
from lit_gpt.launch.watchdog import Watchdog
from lit_gpt.launch.world import Fabric, any_rank
from lit_gpt.train.agreement import agree
from lit_gpt.train.expectation import write_expectation
from lit_gpt.train.garbage import manual_collection
from lit_gpt.train.optimizer import make_optimizer
from lit_gpt.train.pauses import Pauses
from lit_gpt.train.profiler import StepProfiler
from lit_gpt.train.progress import ProgressBar
from lit_gpt.train.rank_watch import RankWatch
from lit_gpt.train.replicas import require_equal_copies
from lit_gpt.train.resolve import in_words, resolve, resolved_choices
from lit_gpt.train.rollback import Rollback
from lit_gpt.train.run_inputs import RunInputs, node_memory, open_cache, training_rows, validation_rows
from lit_gpt.train.run_report import RunReport
from lit_gpt.train.run_state import RunState
from lit_gpt.train.settings import Settings
from lit_gpt.train.sharding import build_model
from lit_gpt.train.speed_monitor import SpeedMonitor
from lit_gpt.train.step_guard import SkippedStep
from lit_gpt.train.train_step import TrainStep, Update
from lit_gpt.train.validation import compile_without_gradients

log = logging.getLogger(__name__)


class Trainer:
    """One rank of a run."""

    def __init__(
        self,
        asked: Settings,
        repeated: dict[str, Any] | None,
        flags: Collection[str],
        inputs: RunInputs,
        fabric: Fabric,
        stop: StopRequest,
        name: str,
        line: Line,
        phases: StartPhases,
    ) -> None:
        """asked: settings before they are resolved; name: of the rank (world.rank_name); line: to rank 0; phases: of
        the start, so far."""
        self.inputs, self.fabric, self.stop, self.phases = inputs, fabric, stop, phases
        self.rank, self.device = fabric.global_rank, fabric.device
        self.watchdog = Watchdog(inputs.run_dir / "watchdog", name, self.rank, inputs.world.size, asked)
        self.ranks = Ranks(fabric, self.watchdog)
        line.where, line.code_after_silence = self.watchdog.where, self.watchdog.code_after_stall
        self.watchdog.on_stall = line.leave
        self.settings = settings = resolve(asked, inputs.config, inputs.world, self.device)
        resolved = resolved_choices(settings)
        log.info("%s", in_words(resolved))
        torch.manual_seed(settings.seed)  # nothing draws from it, but checkpoints hold its state
        self.model = build_model(self.fabric, inputs.config, settings)
        self.optimizer = make_optimizer(self.model, settings, compiled=bool(settings.compile))
        self.train_step = TrainStep(self.fabric, self.model, self.optimizer, settings)
        self.cache = open_cache(settings)
        self.dataset = training_rows(inputs, settings, self.cache)
        validation = validation_rows(inputs, settings)
        self.memory = node_memory(inputs, settings, self.rank - fabric.local_rank)
        parts = self.model, self.optimizer, self.train_step.guard
        self.state = RunState(asked, resolved, repeated, inputs, self.ranks, self.dataset, *parts, flags, self.memory)
        phases.end("model")
        self.state.start()
        phases.end("checkpoint")
        self.watchdog.start_from(self.state.step)
        writes = self.rank == 0 and not self.state.ended
        self.report = RunReport(inputs.run_dir, enabled=settings.report and writes)
        if writes:
            write_expectation(inputs.run_dir, settings, inputs.config, inputs.world.size, self.state.length)
        self._follow_length()
        stop.note_save(self.state.load_s)
        self.monitor = SpeedMonitor(inputs.config, inputs.world.size, self.device)
        blocks = unwrapped(self.model).transformer.h
        self.watch = RankWatch(blocks, self.device, name, inputs.run_dir, first_of_node=fabric.local_rank == 0)
        self.pauses = Pauses(settings, inputs, validation, self.train_step, stop, self.watchdog, self.monitor)
        self.profiler = StepProfiler(settings.profile_steps if self.rank == 0 else None, inputs.run_dir, self.device)
        self.saver = CheckpointSaver(
            inputs.run_dir,
            self.model,
            self.optimizer,
            full=settings.state_dict_type == "full",
            overlap=bool(settings.async_save),
            keep_last=settings.keep_last_checkpoints,
            keep_every_steps=settings.keep_every_steps,
            timeout=settings.group_timeout,
            memory=self.memory,
        )
        self._copies = settings.mesh_shape(inputs.world.devices, inputs.world.size).get("replicate", 1)
        self._name = name

    def run(self) -> int:
        """Take all steps; returns the program's exit code."""
        last = self.state.length.steps
        if self.state.ended:
            self.state.log_finish()
            self._clear_memory()
            return 0
        self.ranks.on_zero("looking at the job's end", self.stop.refuse_too_short_a_job)
        if any_rank(self.stop.signal is not None):
            return self.stop.log_early_stop()
        self._require_equal_copies()
        self.stop.answer_while_training()
        log.info("from step %d on in %s; in all %s", self.state.step, self.inputs.run_dir, self.state.length)
        self.saver.log_room()
        compile_without_gradients(self.train_step.loss, self.settings, self.inputs.config.block_size)
        self.phases.end("set-up")
        with manual_collection(), ProgressBar(last, self.state.step, enabled=self.rank == 0) as progress:
            while True:
                with self._open_loader() as loader:
                    rollback = self._take_steps(loader, progress)
                if rollback is not None:
                    self._roll_back(rollback)
                if rollback is None or self.stop.agreed:
                    break
        self.profiler.stop()
        return self._finish()

    def _open_loader(self) -> StepLoader:
        return StepLoader(
            self.dataset,
            global_batch_size=self.settings.global_batch_size,
            micro_batch_size=self.settings.micro_batch_size,
            rank=self.rank,
            world_size=self.inputs.world.size,
            first_slot=self.state.slot,
            left_out=self.state.rollbacks.left_out,
            max_steps=self.state.length.steps - self.state.step,
            pin_memory=self.device.type == "cuda",
        )

    def _take_steps(self, loader: StepLoader, progress: ProgressBar) -> Rollback | None:
        """Take steps to the loader's end, a stop (then `stop.agreed` says why) or a spike; returns the rollback to do.

        The last step is saved, unless there is a rollback.
        """
        state, guard = self.state, self.train_step.guard
        last, done = state.step + loader.steps, None
        self._saved_at = -1 if state.from_memory else state.step
        self._logged_at = state.step
        for data in loader:
            self.profiler.before_step(state.step + 1)
            self.watchdog.at("agree")
            agreed = agree(data, self.stop, self.saver, self.pauses.due(state.step + 1, last))
            self.watchdog.at("update")
            if agreed.save_broken:
                self.saver.wait()
            if self.stop.agreed:
                break
            done = agreed.targets, self.train_step.update(state.step, data.batches, agreed.targets)
            self.phases.step_done(done[1].verdict)
            state.step_done(data, agreed.targets, agreed.digest)
            self.saver.prepare()
            guard.note(state.step, data.first_slot, data.rows, done[1].verdict, done[1].grad_norm)
            waited_s = loader.take_wait_s()
            self.monitor.count(agreed.targets, waited_s)
            self.watch.step_done(agreed.targets, waited_s)
            rollback = self._end_step(*done, progress, last)
            if rollback is not None:
                return rollback
            if self.stop.agreed or self._gave_up is not None:
                break
        self.stop.note_ending()
        if self.stop.agreed and done and self._saved_at < state.step:
            return self._end_step(*done, progress, last)
        if self._saved_at < state.step:
            self._save(wait=True)
        self.watchdog.at("save")
        self.saver.wait()
        assert self._saved_at == state.step
        return None

    def _end_step(self, targets: int, update: Update, progress: ProgressBar, last: int) -> Rollback | None:
        """Log, validate, save and sample, as far as it is due after the update; returns the rollback to do instead."""
        settings, state, guard = self.settings, self.state, self.train_step.guard
        pauses = [] if self.stop.agreed else self.pauses.due(state.step, last)
        ended = self.stop.agreed is not None or state.step == last
        log_now = "validate" in pauses or ended or state.step % settings.log_interval_steps == 0
        save_now = ended or state.step % settings.save_interval_steps == 0
        in_memory = settings.memory_checkpoint_steps
        memory_now = in_memory is not None and state.step % in_memory == 0
        if log_now or save_now or memory_now:
            gc.collect()
            rollback = self._plan_rollback(guard.record(state.datapoints))
            if rollback is not None:
                return rollback
        if log_now and self._logged_at < state.step:
            epochs = state.slot / self.dataset.rows_per_epoch
            progress.show(self._log(targets, update, evaluate="validate" in pauses), epochs)
            self._logged_at = state.step
        ended = ended or self.stop.agreed is not None or self._gave_up is not None  # the validation may have met a stop
        if save_now or ended:
            self._save(wait=ended)
        elif memory_now:
            self._save(wait=False, in_memory=True)
        self.watchdog.step_done(state.step)
        progress.advance(state.step)
        if "sample" in pauses and not self.stop.agreed:
            self.pauses.sample(state.step, state.trackers)
        return None

    def _plan_rollback(self, skipped: list[SkippedStep]) -> Rollback | None:
        """The rollback to do, if any. All ranks plan the same: they see the same gradient norms."""
        spikes = self.state.rollbacks.spikes(skipped)
        if not spikes:
            return None
        self.watchdog.at("rollback")
        self.saver.wait()
        return self.state.plan_rollback(spikes)

    def _roll_back(self, rollback: Rollback) -> None:
        self.profiler.stop()
        self.state.roll_back(rollback)
        self._follow_length()
        self.stop.note_save(self.state.load_s)  # also: the step that the rollback interrupts is not measured
        self.saver.failure = None  # of a save after the spike: the run is at a checkpoint again
        self.monitor.restart()

    def _follow_length(self) -> None:
        self.settings = replace(self.settings, max_steps=self.state.length.steps)
        self.train_step.settings = self.settings

    @property
    def _gave_up(self) -> str | None:
        """Why the run should not go on; None if it should."""
        if self.state.rollbacks.exhausted:
            return f"a spike came after {len(self.state.rollbacks.left_out)} rollbacks (--max_rollbacks)"
        if self.train_step.guard.gave_up:
            return f"{self.settings.max_skipped_steps} updates in a row were skipped (--max_skipped_steps)"
        return None

    def _finish(self) -> int:
        if self.saver.failure:
            if self.rank == 0:
                log.error("ended after step %d, without its last checkpoint: %s", self.state.step, self.saver.failure)
            return EXIT_NOT_SAVED
        self._clear_memory()
        if self._gave_up:
            log.error("gave up after step %d, saved: %s", self.state.step, self._gave_up)
            return EXIT_GAVE_UP
        if self.stop.agreed:
            return self.stop.log_stop(self.state.step)
        self.state.log_finish()
        return 0

    def _clear_memory(self) -> None:
        if self.memory is not None and (self.inputs.run_dir / checkpoint_name(self.state.step)).exists():
            self.memory.clear()

    def _log(self, targets: int, update: Update, *, evaluate: bool) -> dict[str, Any]:
        """Read the step's numbers from the device (which waits for it), log them, and return the line of metrics."""
        self.watchdog.at("log")
        of_ranks = self.watch.columns(self.state.step)
        if dist.is_initialized():
            dist.all_reduce(update.loss_sum)
        row: dict[str, Any] = {
            "step": self.state.step,
            "loss": update.loss_sum.item() / max(targets, 1),
            "learning_rate": update.learning_rate,
            "grad_norm": update.grad_norm.item(),
            "targets": targets,
            "epoch": (self.state.slot - 1) // self.dataset.rows_per_epoch,
            "tokens": self.state.total_targets,
            "skipped_steps": self.train_step.guard.skipped,
            **self.monitor.read()._asdict(),
            **of_ranks,
        }
        if evaluate:
            row |= self.pauses.validate(self.state.step)
        row |= self.monitor.take_pauses()
        if self.state.trackers is not None:
            self.state.trackers.log(row)
        return row

    def _require_equal_copies(self) -> None:
        require_equal_copies(self.optimizer, self._copies, self._name)

    def _save(self, *, wait: bool, in_memory: bool = False) -> None:
        self.watchdog.at("save")
        self._require_equal_copies()
        began = time.monotonic()
        self.saver.save(self.state.checkpoint_facts(), wait=wait, in_memory=in_memory)
        seconds = time.monotonic() - began
        self.stop.note_save(seconds)
        self.monitor.note_pause("save", seconds)
        self.monitor.restart()
        if not in_memory:
            self.report.write()
            self._saved_at = self.state.step

    def settle(self) -> None:
        """Finish the checkpoint that is being written, if one is: another rank has failed. Any thread may call it."""
        self.watchdog.at("failed")
        self.saver.settle()

    def close(self) -> None:
        self.watchdog.close()
        self.saver.close()
        if self.cache is not None:
            log.info("shard cache: %s", self.cache.report())
            self.cache.close()
            self.cache = None
        self.state.close()
        self.report.close(wait=self.stop.agreed is None)
