"""One start of the training program: settings in, an exit code out.

Whatever can be refused is refused before any process starts (`open_inputs`); then come processes, and what they do
together (trainer.py).
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import asdict, replace
from typing import Any

import torch.distributed as dist

from lit_gpt.cli import EXIT_FAILURE
from lit_gpt.datapoints.run_folder import with_absolute_paths
from lit_gpt.launch.compile_cache import use_compile_cache
from lit_gpt.launch.failures import Failures
from lit_gpt.launch.meeting import StoppedBeforeMeeting
from lit_gpt.launch.refusal import refusals_told
from lit_gpt.launch.signals import StopFlag
from lit_gpt.launch.start_phases import StartPhases
from lit_gpt.launch.stop import StopRequest
from lit_gpt.launch.watchdog import how_ended
from lit_gpt.launch.world import any_rank, hold_line, rank_name, record_collectives, starts_alone
from lit_gpt.train.replicas import CopiesDiffer
from lit_gpt.train.run_inputs import open_inputs
from lit_gpt.train.settings import Settings
from lit_gpt.train.sharding import launch_run
from lit_gpt.train.trainer import Trainer

log = logging.getLogger(__name__)


def train(
    settings: Settings, stop_flag: StopFlag, repeated: dict[str, Any] | None = None, flags: Collection[str] = ()
) -> int:
    """Train to the end that run_length.py gives, a stop signal or the job's end; returns the program's exit code.

    settings: as asked for; they have passed `check`. repeated: resolved.json of the run whose settings.yaml this run
    repeats, or None (run_folder.read_resolved). flags: names of the settings that the command line gave. Raises
    BadInput; any other exception ends the process.
    """
    settings = replace(settings, **with_absolute_paths(asdict(settings)))
    phases, stop = StartPhases(), StopRequest(stop_flag, settings)
    try:
        with refusals_told(stop_flag):
            use_compile_cache()
            inputs = open_inputs(settings)
            phases.end("data")
            if starts_alone(inputs.world) and stop.signal:
                return stop.log_early_stop()
            record_collectives(inputs.run_dir / "watchdog")
            fabric = launch_run(settings, inputs.world, stop_flag)
    except StoppedBeforeMeeting:
        return stop.log_early_stop()
    name, trainer = rank_name(fabric.global_rank, fabric.device), None
    phases.end("meeting")
    line = hold_line(fabric, inputs.world, name, inputs.run_dir / "watchdog", settings)
    failures = Failures(fabric, line)
    try:
        if any_rank(stop.signal is not None):
            return stop.log_early_stop()
        trainer = Trainer(settings, repeated, flags, inputs, fabric, stop, name, line, phases)
        failures.before_end = trainer.settle
        code = trainer.run()
        trainer.watchdog.at(how_ended(code, finished=trainer.state.ended))
        return code
    except Exception as error:  # noqa: BLE001 - the process ends here, with the rank's name
        where = f"{name} failed at step {trainer.state.step + 1 if trainer else 0}"
        try:
            if trainer is not None:
                trainer.watchdog.at("failed")
                trainer.close()  # does not return if the failure follows from a stall, which the watchdog reports
        finally:  # a second failure must not hide the first
            if not isinstance(error, CopiesDiffer):
                failures.end(where, error)
        if fabric.is_global_zero:
            log.error("after step %d: %s", trainer.state.step if trainer else 0, error)
        return EXIT_FAILURE
    finally:
        failures.close()
        if trainer is not None:
            trainer.close()
        if dist.is_initialized():
            dist.destroy_process_group()
        line.leave()
