"""Settings of processes, of a job's end, and of the watchdog. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

from lit_gpt.cli import SettingsSlice


@dataclass(frozen=True)
class LaunchSettings(SettingsSlice):
    """Processes: on which devices, how many."""

    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    """Type of device; auto: CUDA if a GPU is visible, else the CPU."""
    devices: int | None = None
    """Processes on each node, one per device. Default: all GPUs of the node, or 1 on CPUs."""
    num_nodes: int = 1
    """Nodes of the run."""
    deterministic: bool = False
    """Use only deterministic kernels: a repeated run gives the same bits on GPUs too, but each step is slower."""

    def check(self) -> None:
        super().check()
        self.require_at_least(1, "devices", "num_nodes")


@dataclass(frozen=True)
class StopSettings(SettingsSlice):
    """The end of a job: when a run saves and stops by itself."""

    time_limit_s: float | None = None
    """Seconds from the program's start to the end of the job, before which the run saves and stops. Inside a Slurm job,
    Slurm's own time limit counts too."""
    stop_margin_s: float = 60.0
    """Seconds kept free before the job's end, on top of twice the longest save and twice the longest step."""

    def check(self) -> None:
        super().check()
        self.require_above(0, "time_limit_s")
        self.require_not_negative("stop_margin_s")


@dataclass(frozen=True)
class WatchdogSettings(SettingsSlice):
    """The watchdog: when a step that does not end counts as a stall."""

    watchdog_factor: float = 10.0
    """A step that takes this many times the median of recent steps ends the run, after all ranks have written their
    stacks; 0 turns the watchdog off."""
    watchdog_floor_s: float = 300.0
    """Seconds that every step may take, whatever the median is."""
    watchdog_long_s: float = 1800.0
    """Seconds that set-up, each of the first two steps (they compile), a validation, a save or a rollback may take."""
    silent_rank_s: float = 25.0
    """Seconds without a sign of life of a rank, which was stopped or whose node is gone, after which all end; 0: never.
    A rank that ends or fails is noticed at once."""

    @property
    def longest_s(self) -> float:
        """Seconds that the long parts of a run may take."""
        return max(self.watchdog_long_s, self.watchdog_floor_s)

    @property
    def group_timeout(self) -> timedelta:
        """After this a collective fails: some rank is dead. Later than the watchdog, which tells more."""
        return timedelta(seconds=self.longest_s + 60)

    def check(self) -> None:
        super().check()
        self.require_above(0, "watchdog_floor_s", "watchdog_long_s")
        self.require_not_negative("watchdog_factor", "silent_rank_s")
