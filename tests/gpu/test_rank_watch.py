"""On a GPU: what the driver tells of it, and the time of blocks without what runs between them."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor, nn

from lit_gpt.launch.sensors import GpuSensors
from lit_gpt.train.compute_clock import ComputeClock

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


class Products(nn.Module):
    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.number):
            x @ x
        return x


def test_the_driver_tells_of_the_gpu() -> None:
    device = torch.device("cuda", 0)
    sensors = GpuSensors(device)
    assert sensors.fault is None
    x = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    began, before = time.monotonic(), sensors.read()
    while time.monotonic() - began < 2:
        Products(20)(x)
        torch.cuda.synchronize()
    now, seconds = sensors.read(), time.monotonic() - began
    print(now)
    assert 100 < now.clock_mhz < 5000
    assert 15 < now.temperature_c < 110
    assert 20 < now.power_w < 3000
    assert 20 < (now.energy_j - before.energy_j) / seconds < 3000
    assert now.throttle_bits == int(now.throttle_bits) >= 0


def test_the_clock_leaves_out_what_runs_between_blocks() -> None:
    """40 products in a block and 400 before it, against a block of 44: some 1.1 times. Nothing waits for the GPU."""
    device = torch.device("cuda", 0)
    x = torch.randn(4096, 4096, device=device, dtype=torch.bfloat16)
    seconds = []
    for number, between in ((40, 400), (44, 0)):
        block = Products(number)
        clock = ComputeClock([block], device)
        for step in range(6):
            if step == 1:
                torch.cuda.synchronize()
                clock.step_done()
                clock.take()
                torch.cuda.set_sync_debug_mode("error")
            Products(between)(x)
            block(x)
            if step:
                clock.step_done()
        torch.cuda.set_sync_debug_mode(0)
        torch.cuda.synchronize()
        block(x)
        clock.step_done()
        seconds.append(clock.take())
    print(seconds)
    assert seconds[1] / seconds[0] == pytest.approx(1.1, abs=0.06)
