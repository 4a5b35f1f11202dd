"""Which rank is slow, and what the run costs: of each rank its compute time, data wait, GPU and energy, at log steps.

A slow GPU slows all ranks, and no rank's step shows whose it is. So rank 0 compares the ranks' compute times
(compute_clock.py) over WINDOW_STEPS steps: a rank that takes more than SLOW times the median is named once, with host
and GPU. metrics.csv gets the extremes over all ranks, ranks.csv each rank as of the last window.

Costs: at a log step some calls of the driver, and one message of eight numbers from each rank to rank 0, on the host,
while the GPU still computes.
"""

from __future__ import annotations

import csv
import io
import logging
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from lit_gpt.datapoints.line_log import or_alarm
from lit_gpt.files import publish
from lit_gpt.launch.sensors import GpuSensors, HostEnergy, throttled_by
from lit_gpt.train.compute_clock import ComputeClock

log = logging.getLogger(__name__)

FILE = "ranks.csv"
WINDOW_STEPS = 50
SLOW = 1.05


class Reading(NamedTuple):
    """One rank since the last log step; NaN where it is not known."""

    compute_s: float
    """Seconds a step in the blocks' forward passes; NaN for a single rank."""
    data_wait_s: float
    """Seconds a step."""
    gpu_clock_mhz: float
    gpu_temperature_c: float
    gpu_power_w: float
    throttle_bits: float
    gpu_energy_j: float
    host_energy_j: float
    """Of the node, from its first rank; 0 from its others."""

    @property
    def throttled(self) -> list[str]:
        return [] if math.isnan(self.throttle_bits) else throttled_by(int(self.throttle_bits))

    def gpu_in_words(self) -> str:
        """As far as it is known, after a colon."""
        values = (self.gpu_clock_mhz, "MHz"), (self.gpu_temperature_c, "C"), (self.gpu_power_w, "W")
        parts = [f"{value:.0f} {unit}" for value, unit in values if not math.isnan(value)]
        return ": " + ", ".join([*parts, *self.throttled]) if parts else ""


class SlowRanks:
    """Finds slow ranks, each once."""

    def __init__(self) -> None:
        self._seconds: list[float] = []
        self._steps = 0
        self._found: set[int] = set()

    def note(self, compute_s: Sequence[float], steps: int) -> list[tuple[int, float]] | None:
        """(rank, times the median) of each rank that is newly slow in the window which these steps end; None if they
        end none.

        compute_s: seconds of each of the steps, by rank. Of two in the middle, the lower is the median.
        """
        if any(math.isnan(seconds) for seconds in compute_s):
            return None
        before = self._seconds or [0.0] * len(compute_s)
        self._seconds = [sum_s + seconds * steps for sum_s, seconds in zip(before, compute_s, strict=True)]
        self._steps += steps
        if self._steps < WINDOW_STEPS:
            return None
        median = statistics.median_low(self._seconds)
        ratios = {rank: seconds / median for rank, seconds in enumerate(self._seconds) if seconds > SLOW * median}
        self._seconds, self._steps = [], 0
        new = [(rank, ratio) for rank, ratio in ratios.items() if rank not in self._found]
        self._found |= ratios.keys()
        return new


class RankWatch:
    """One rank's part; all ranks make one, and make the same calls."""

    def __init__(
        self, blocks: Iterable[nn.Module], device: torch.device, name: str, run_dir: Path, *, first_of_node: bool
    ) -> None:
        """blocks: of the sharded model; name: of the rank, as messages give it. A collective."""
        self._path = run_dir / FILE
        self._world = dist.get_world_size() if dist.is_initialized() else 1
        self._names: list[str] | None = [name]
        """Of all ranks, on rank 0."""
        if self._world > 1:
            self._names = [""] * self._world if dist.get_rank() == 0 else None
            dist.gather_object(name, self._names)
        self._clock = ComputeClock(blocks if self._world > 1 else (), device)
        self._gpu, self._host = GpuSensors(device), HostEnergy() if first_of_node else None
        self._gpu_j, self._host_j = self._gpu.read().energy_j, self._host.read() if self._host else 0.0
        self._slow = SlowRanks()
        self._compiled = False
        self._steps, self._waited_s, self._targets = 0, 0.0, 0
        if self._names is not None and self._gpu.fault is not None:
            log.warning("clocks, heat and energy of the GPUs are not recorded: %s", self._gpu.fault)
        elif self._names is not None and device.type == "cuda" and math.isnan(self._host_j):
            log.info("joules_per_token is of the GPUs: the hosts' energy counters (RAPL) cannot be read")

    def step_done(self, targets: int, data_wait_s: float) -> None:
        """Count a step of `targets` valid targets over all ranks."""
        self._clock.step_done()
        self._targets += targets
        if not self._compiled:  # what the first step took is of no interest
            self._compiled = True
            self._clock.take()
            return
        self._steps += 1
        self._waited_s += data_wait_s

    def columns(self, step: int) -> dict[str, float]:
        """The columns of metrics.csv since the last call, on rank 0; none elsewhere. A collective of the hosts, which
        waits for no GPU."""
        steps, targets = self._steps, self._targets
        readings = self._gathered(self._read())
        if self._names is None:
            return {}
        columns = _extremes(readings) | _energy_columns(readings, targets)
        if steps and self._world > 1:
            slow = self._slow.note([reading.compute_s for reading in readings], steps)
            if slow is not None:
                self._tell(slow, readings)
                self._write(step, readings)
        return {name: value for name, value in columns.items() if not math.isnan(value)}

    def _read(self) -> Reading:
        gpu, before = self._gpu.read(), (self._gpu_j, self._host_j)
        self._gpu_j, self._host_j = gpu.energy_j, self._host.read() if self._host else 0.0
        waited_s = self._waited_s / self._steps if self._steps else math.nan
        self._steps, self._waited_s, self._targets = 0, 0.0, 0
        energy = self._gpu_j - before[0], self._host_j - before[1]
        return Reading(self._clock.take(), waited_s, *gpu[:4], *energy)

    def _gathered(self, reading: Reading) -> list[Reading]:
        """Of all ranks, on rank 0."""
        if self._world == 1:
            return [reading]
        own = torch.tensor(reading, dtype=torch.float64)
        everywhere = [torch.empty_like(own) for _ in range(self._world)] if self._names is not None else None
        dist.gather(own, everywhere)
        return [Reading(*numbers.tolist()) for numbers in everywhere or ()]

    def _tell(self, slow: Sequence[tuple[int, float]], readings: Sequence[Reading]) -> None:
        assert self._names is not None
        for rank, ratio in slow:
            log.warning(
                "slow: %s computes %.2f times as long as the median of all ranks, over %d steps or more%s. All ranks "
                "wait for it: look at its node (scripts/check_node.py)",
                self._names[rank], ratio, WINDOW_STEPS, readings[rank].gpu_in_words(),
            )  # fmt: skip

    def _write(self, step: int, readings: Sequence[Reading]) -> None:
        assert self._names is not None
        text = io.StringIO()
        lines = csv.writer(text)
        lines.writerow(["step", "rank", "name", *Reading._fields[:5], "throttled"])
        for rank, (name, reading) in enumerate(zip(self._names, readings, strict=True)):
            numbers = ["" if math.isnan(value) else f"{value:.6g}" for value in reading[:5]]
            lines.writerow([step, rank, name, *numbers, "; ".join(reading.throttled)])
        or_alarm(self._path, lambda: publish(self._path, [text.getvalue().encode()]))


def _extremes(readings: Sequence[Reading]) -> dict[str, float]:
    """What the ranks are like; NaN where it is not known of all."""
    of = {name: [reading[place] for reading in readings] for place, name in enumerate(Reading._fields)}
    known = {name: not any(map(math.isnan, values)) for name, values in of.items()}
    columns: dict[str, float] = {}
    if known["compute_s"]:
        slowest = max(of["compute_s"])
        columns |= {"compute_s": statistics.median_low(of["compute_s"]), "slowest_compute_s": slowest}
        columns |= {"slowest_rank": of["compute_s"].index(slowest), "longest_data_wait_s": max(of["data_wait_s"])}
    if known["gpu_clock_mhz"]:
        columns["gpu_clock_mhz"] = min(of["gpu_clock_mhz"])
    if known["gpu_temperature_c"]:
        columns["gpu_temperature_c"] = max(of["gpu_temperature_c"])
    if known["gpu_power_w"]:
        columns["gpu_power_w"] = statistics.fmean(of["gpu_power_w"])
    if known["throttle_bits"]:
        columns["throttled_gpus"] = sum(bool(reading.throttled) for reading in readings)
    return columns


def _energy_columns(readings: Sequence[Reading], targets: int) -> dict[str, float]:
    """Joules of all GPUs and of all hosts, NaN where one is not known; and of those that are known, for each token."""
    energy = {"gpu_energy_j": sum(reading.gpu_energy_j for reading in readings)}
    energy["host_energy_j"] = sum(reading.host_energy_j for reading in readings)
    used = [joules for joules in energy.values() if not math.isnan(joules)]
    return {**energy, "joules_per_token": sum(used) / targets if used and targets else math.nan}
