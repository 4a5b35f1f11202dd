"""Settings of processes, of a job's end, and of the watchdog. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lit_gpt.cli import SettingsSlice


@dataclass(frozen=True)
class LaunchSettings(SettingsSlice):
    """Processes: on which devices, how many."""

    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    """Kind of device; auto takes CUDA where there is one."""
    devices: int | None = None
    """Processes a node, one a device. Default: all GPUs of the node, or 1 on CPUs."""
    num_nodes: int = 1
    """Nodes of the run."""
    deterministic: bool = False
    """Only kernels that give the same bits each time: exact repetition on GPUs too, at a price in speed."""

    def check(self) -> None:
        super().check()
        self.require_at_least(1, "devices", "num_nodes")


@dataclass(frozen=True)
class StopSettings(SettingsSlice):
    """The end of a job: when a run saves and stops by itself."""

    time_limit_s: float | None = None
    """Seconds after which the run saves and stops, counted from its start; a Slurm job also knows its own end."""
    stop_margin_s: float = 60
    """Seconds kept free before the job's end, beside twice the longest save and step."""

    def check(self) -> None:
        super().check()
        self.require_above(0, "time_limit_s")
        self.require_not_negative("stop_margin_s")


@dataclass(frozen=True)
class WatchdogSettings(SettingsSlice):
    """The watchdog: when a step that does not end counts as a stall."""

    watchdog_factor: float = 10
    """A step that takes this many times the usual ends the run with the stacks of all ranks; 0 turns that off."""
    watchdog_floor_s: float = 300
    """Seconds that every step may take, whatever the usual is."""
    watchdog_long_s: float = 1800
    """Seconds that the set-up, the first two steps (they compile), a validation or a save may take."""

    def check(self) -> None:
        super().check()
        self.require_above(0, "watchdog_floor_s", "watchdog_long_s")
        self.require_not_negative("watchdog_factor")
