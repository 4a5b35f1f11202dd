"""What a run does between two steps that is longer than a step: a validation, texts from the model.

Invariant: a pause can be left at any batch or token. When the ranks have agreed to stop, they leave it and save.
Costs: one sum of two integers over the hosts for each batch of a validation and each token of the texts.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

from lit_gpt.data.loader import PackedDataset
from lit_gpt.launch.stop import Pause, StopRequest
from lit_gpt.launch.watchdog import Watchdog
from lit_gpt.train.agreement import agree_to_end_pause
from lit_gpt.train.run_inputs import RunInputs
from lit_gpt.train.sampling import sample
from lit_gpt.train.settings import Settings
from lit_gpt.train.speed_monitor import SpeedMonitor
from lit_gpt.train.trackers import Trackers
from lit_gpt.train.train_step import TrainStep
from lit_gpt.train.validation import validate

log = logging.getLogger(__name__)


class _Left(Exception):
    """The ranks have agreed to stop."""


class Pauses:
    """The pauses of one rank; every rank makes the same calls."""

    def __init__(
        self,
        settings: Settings,
        inputs: RunInputs,
        validation: PackedDataset | None,
        train_step: TrainStep,
        stop: StopRequest,
        watchdog: Watchdog,
        monitor: SpeedMonitor,
    ) -> None:
        """validation: the rows of inputs.val."""
        self._settings, self._inputs, self._validation = settings, inputs, validation
        self._train_step, self._stop, self._watchdog, self._monitor = train_step, stop, watchdog, monitor

    def due(self, step: int, last: int) -> list[Pause]:
        """What follows update number `step` of a run that ends after update number `last`."""
        settings = self._settings
        pauses: list[Pause] = []
        if self._validation is not None and (step % settings.eval_interval_steps == 0 or step == last):
            pauses.append("validate")
        if settings.sample_interval_steps and step % settings.sample_interval_steps == 0:
            pauses.append("sample")
        return pauses

    def validate(self, step: int) -> dict[str, float]:
        """The validation's columns of the step's line of metrics; none if a stop ended it. A collective."""
        assert self._validation is not None
        assert self._inputs.val is not None
        columns: dict[str, float] = {}
        with self._pause("validate", step):
            result = validate(
                self._train_step.loss,
                self._validation,
                self._inputs.val,
                micro_batch_size=self._settings.micro_batch_size,
                max_rows=self._settings.eval_max_rows,
                device=self._train_step.device,
                before_batch=self._leave_if_stopped,
            )
            columns = {f"val_{name}": value for name, value in result._asdict().items()}
        return columns

    def sample(self, step: int, trackers: Trackers | None) -> None:
        """Let the model write texts, and log them. A collective."""
        assert self._inputs.prompts is not None
        with self._pause("sample", step):
            samples = sample(
                self._train_step.next_logits,
                self._inputs.prompts,
                self._settings,
                rows=self._settings.micro_batch_size,
                block_size=self._inputs.config.block_size,
                vocab_size=self._inputs.config.vocab_size,
                seed=self._settings.seed,
                step=step,
                device=self._train_step.device,
                before_token=self._leave_if_stopped,
            )
            if trackers is not None:
                trackers.log_samples(step, samples)

    @contextmanager
    def _pause(self, pause: Pause, step: int) -> Iterator[None]:
        self._watchdog.at(pause)
        began = time.monotonic()
        try:
            yield
        except _Left:
            log.info("step %d: left out, to save at once: %s", step, pause)
        seconds = time.monotonic() - began
        self._stop.note_pause(pause, seconds)
        self._monitor.note_pause(pause, seconds)
        self._monitor.restart()

    def _leave_if_stopped(self) -> None:
        if agree_to_end_pause(self._stop):
            raise _Left
