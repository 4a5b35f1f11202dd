"""What the driver says of a GPU, and what its node's processors use: clock, heat, power, energy.

NVML (nvidia-ml-py) tells of the GPU, RAPL of the processors and their memory. What a machine does not tell is NaN: no
GPU, no driver, a part of a GPU (MIG), a counter that only root may read.
Costs: some calls of the driver, a few ms in all, and none of the GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

RAPL = Path("/sys/class/powercap")
THROTTLED = {
    0x8: "hardware slowdown", 0x20: "software thermal slowdown", 0x40: "hardware thermal slowdown",
    0x80: "power brake slowdown",
}  # fmt: skip
"""NVML's reasons for a lower clock that a healthy GPU does not show, by bit. (At full load it often shows 0x4, its
power limit.)"""


def throttled_by(bits: int) -> list[str]:
    """The names of THROTTLED whose bits are set."""
    return [name for bit, name in THROTTLED.items() if bits & bit]


class GpuReading(NamedTuple):
    """A GPU now; NaN where it is not known."""

    clock_mhz: float = math.nan
    """Of its multiprocessors."""
    temperature_c: float = math.nan
    power_w: float = math.nan
    throttle_bits: float = math.nan
    """NVML's reasons for the present clock."""
    energy_j: float = math.nan
    """Used since the driver was loaded."""


class GpuSensors:
    """What NVML knows of one GPU."""

    def __init__(self, device: torch.device) -> None:
        self._nvml: Any = None
        self.fault: str | None = None
        """Why nothing is known of a GPU."""
        if device.type != "cuda":
            return
        try:
            import pynvml
        except ImportError:
            self.fault = "the package nvidia-ml-py is missing"
            return
        try:
            pynvml.nvmlInit()
            uuid = str(torch.cuda.get_device_properties(device).uuid)
            name = uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(name)
            self._nvml = pynvml
        except pynvml.NVMLError as error:
            self.fault = f"NVML: {error}"

    def read(self) -> GpuReading:
        nvml = self._nvml
        if nvml is None:
            return GpuReading()
        return GpuReading(
            self._ask(nvml.nvmlDeviceGetClockInfo, nvml.NVML_CLOCK_SM),
            self._ask(nvml.nvmlDeviceGetTemperature, nvml.NVML_TEMPERATURE_GPU),
            self._ask(nvml.nvmlDeviceGetPowerUsage) / 1000,
            self._ask(nvml.nvmlDeviceGetCurrentClocksThrottleReasons),
            self._ask(nvml.nvmlDeviceGetTotalEnergyConsumption) / 1000,
        )

    def _ask(self, call: Callable[..., Any], *arguments: Any) -> float:
        try:
            return float(call(self._handle, *arguments))
        except self._nvml.NVMLError:  # this GPU does not have it
            return math.nan


class HostEnergy:
    """The energy counters of a node's processors and of their memory. They count all that runs there."""

    def __init__(self, folder: Path = RAPL) -> None:
        self._counters = list(_counters(folder))
        self._used_j = 0.0 if self._counters else math.nan
        self._last = self._read()

    def read(self) -> float:
        """Joules since this object was made, asked at least every few minutes; NaN where they cannot be read."""
        now = self._read()
        for (_, most), new, last in zip(self._counters, now, self._last, strict=True):
            self._used_j += ((new - last) % (most + 1)) / 1e6  # a counter begins anew after its largest value
        self._last = now
        return self._used_j

    def _read(self) -> list[int]:
        return [int(path.read_text()) for path, _ in self._counters]


def _counters(folder: Path) -> Iterator[tuple[Path, int]]:
    """(file, largest value), in microjoules, of each package and of its memory, which a package's does not count."""
    for zone in sorted(folder.glob("intel-rapl:*")):  # AMD's processors have them under this name as well
        with suppress(OSError, ValueError):
            name = (zone / "name").read_text().strip()
            if name.startswith("package") or name == "dram":
                int((zone / "energy_uj").read_text())  # by default only root may
                yield zone / "energy_uj", int((zone / "max_energy_range_uj").read_text())
