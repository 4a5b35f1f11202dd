"""How fast a run is: tokens/s, model FLOPs utilisation (MFU), and how long each step waited for data.

Only valid targets count as tokens: no padding, no ends of documents. MFU follows PaLM (arXiv:2204.02311, appendix B):
tokens/s times the model's FLOPs a token, divided by the devices' peak. The field counts FLOPs by two rules: `mfu_palm`
counts all weights, `mfu` leaves out the embedding table, which is only looked up.
"""

from __future__ import annotations

import logging
import time
from typing import NamedTuple

import torch
from torch._dynamo.utils import counters

from lit_gpt.config import Config

log = logging.getLogger(__name__)

PEAK_BF16_FLOPS = {
    "H200": 989.4e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989.4e12,
    "GH200": 989.4e12,
    "B200": 2250e12,
    "B100": 1750e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A40": 149.7e12,
    "A10": 125e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
    "V100": 125e12,
}
"""Dense bf16 FLOP/s by NVIDIA's datasheets (V100: fp16), by a part of the device's name; the first match counts."""


def peak_flops(device_name: str) -> float | None:
    """Peak dense bf16 FLOP/s of one device; None if it is not in PEAK_BF16_FLOPS."""
    return next((flops for name, flops in PEAK_BF16_FLOPS.items() if name in device_name), None)


PAUSES = ("validate", "sample", "save")
"""What training waits for between steps."""


class Speed(NamedTuple):
    """Averages since the last `read`."""

    tokens_per_s: float
    """Valid targets a second, over all ranks."""
    step_s: float
    """Seconds a step."""
    data_wait_s: float
    """Seconds of step_s that rank 0 waited for rows."""
    mfu: float | None
    """Share of the devices' peak, with 6 (N - embedding) + 12 L C T FLOPs a token; None if the peak is not known."""
    mfu_palm: float | None
    """The same with 6 N + 12 L C T FLOPs a token."""
    memory_gib: float
    """Peak of allocated device memory since the last `read`; 0 on CPUs."""
    compiled_graphs: int
    """Graphs that torch.compile has compiled in this process; a number that keeps rising means recompilations."""


class SpeedMonitor:
    """Counts steps; reads the clock only in `read` and `restart`."""

    def __init__(self, config: Config, devices: int, device: torch.device) -> None:
        self._config = config
        self._device = device
        self._peak = None
        self._graphs = 0
        self._pauses_s = dict.fromkeys(PAUSES, 0.0)
        if device.type == "cuda":
            name = torch.cuda.get_device_name(device)
            per_device = peak_flops(name)
            if per_device is None:
                log.warning("the peak FLOP/s of %r are not known: no MFU", name)
            else:
                self._peak = per_device * devices
        self.restart()

    def restart(self) -> None:
        """Begin new averages, which leave out what came before (a validation, a save)."""
        self._since = time.perf_counter()
        self._targets = self._steps = 0
        self._waited_s = 0.0
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)

    def note_pause(self, pause: str, seconds: float) -> None:
        """Count what training waited for, one of PAUSES."""
        self._pauses_s[pause] += seconds

    def take_pauses(self) -> dict[str, float]:
        """Columns of metrics.csv: seconds of each kind of pause since the last call."""
        found = {f"{pause}_s": seconds for pause, seconds in self._pauses_s.items()}
        self._pauses_s = dict.fromkeys(PAUSES, 0.0)
        return found

    def count(self, targets: int, data_wait_s: float) -> None:
        """Count one step of `targets` valid targets over all ranks."""
        self._targets += targets
        self._steps += 1
        self._waited_s += data_wait_s

    def read(self) -> Speed:
        """Averages since the last `read` or `restart`, of at least one step; then begins new ones."""
        elapsed = time.perf_counter() - self._since
        rate = self._targets / elapsed
        mfu, mfu_palm = (
            None if self._peak is None else rate * self._config.flops_per_token(with_embedding=embedding) / self._peak
            for embedding in (False, True)
        )
        memory = torch.cuda.max_memory_allocated(self._device) / 2**30 if self._device.type == "cuda" else 0.0
        graphs = counters["stats"]["unique_graphs"]
        if graphs != self._graphs:
            log.info("torch.compile: %d graphs so far", graphs)
            self._graphs = graphs
        speed = Speed(rate, elapsed / self._steps, self._waited_s / self._steps, mfu, mfu_palm, memory, graphs)
        self.restart()
        return speed
