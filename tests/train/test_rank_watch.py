"""What is made of the ranks' readings: who is slow, the columns of metrics.csv, the energy."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from lit_gpt.launch.sensors import HostEnergy, throttled_by
from lit_gpt.train.compute_clock import ComputeClock
from lit_gpt.train.rank_watch import Reading, SlowRanks, _energy_columns, _extremes

NAN = math.nan


def test_a_slow_rank_is_found_once_and_only_over_a_window() -> None:
    slow = SlowRanks()
    assert [slow.note([1.0, 1.1, 1.0, 1.04], 10) for _ in range(4)] == [None] * 4
    assert slow.note([1.0, 1.1, 1.0, 1.04], 10) == [(1, pytest.approx(1.1))]
    assert slow.note([1.0, 1.1, 1.0, 1.04], 50) == []  # known already
    assert slow.note([1.0, 1.0, NAN, 1.0], 10) is None  # a rank that measured nothing: these steps do not count
    assert slow.note([1.0, 1.0, 1.3, 1.0], 40) is None
    assert slow.note([1.0, 1.0, 1.0, 1.0], 10) == [(2, pytest.approx(1.24))]  # (40 * 1.3 + 10) / 50


def test_of_two_ranks_the_faster_is_the_measure() -> None:
    assert SlowRanks().note([2.2, 2.0], 50) == [(0, pytest.approx(1.1))]
    assert SlowRanks().note([1.0, 1.05], 50) == []


H100 = Reading(0.20, 0.01, 1980.0, 60.0, 690.0, 0x4, 7000.0, 3000.0)
HOT = Reading(0.25, 0.02, 1200.0, 88.0, 500.0, 0x44, 5000.0, 0.0)


def test_columns_are_the_extremes() -> None:
    assert _extremes([H100, HOT]) == {
        "compute_s": 0.20, "slowest_compute_s": 0.25, "slowest_rank": 1, "longest_data_wait_s": 0.02,
        "gpu_clock_mhz": 1200.0, "gpu_temperature_c": 88.0, "gpu_power_w": 595.0, "throttled_gpus": 1,
    }  # fmt: skip
    unknown = Reading(*[NAN] * 7, 0.0)
    assert _extremes([H100, unknown]) == {}
    assert HOT.gpu_in_words() == ": 1200 MHz, 88 C, 500 W, hardware thermal slowdown"
    assert unknown.gpu_in_words() == ""
    assert throttled_by(0x4) == [], "held at the power limit, as usual under load"


@pytest.mark.parametrize(
    ("gpu_j", "host_j", "a_token"), [(12000, 3000, 1.5), (12000, NAN, 1.2), (NAN, 3000, 0.3), (NAN, NAN, NAN)]
)
def test_joules_a_token_are_of_what_is_known(gpu_j: float, host_j: float, a_token: float) -> None:
    readings = [H100._replace(gpu_energy_j=gpu_j - 5000, host_energy_j=host_j), HOT]
    wanted = {"gpu_energy_j": gpu_j, "host_energy_j": host_j, "joules_per_token": a_token}
    assert _energy_columns(readings, 10_000) == pytest.approx(wanted, nan_ok=True)


def test_energy_of_a_host(tmp_path: Path) -> None:
    """Two packages and a memory; cores are in their package. A counter begins anew after its largest value."""
    zones = {
        "intel-rapl:0": "package-0",
        "intel-rapl:0:0": "core",
        "intel-rapl:0:1": "dram",
        "intel-rapl:1": "package-1",
    }
    for zone, name in zones.items():
        (tmp_path / zone).mkdir()
        for file, text in (("name", name), ("energy_uj", "9000000"), ("max_energy_range_uj", "9999999")):
            (tmp_path / zone / file).write_text(f"{text}\n")
    host = HostEnergy(tmp_path)
    assert host.read() == 0.0
    for zone, microjoules in (("0", 9_500_000), ("0:0", 9_400_000), ("0:1", 9_100_000), ("1", 500_000)):
        (tmp_path / f"intel-rapl:{zone}" / "energy_uj").write_text(f"{microjoules}\n")
    assert host.read() == pytest.approx(0.5 + 0.1 + 1.5)
    (tmp_path / "intel-rapl:1" / "energy_uj").write_text("500001\n")
    assert host.read() == pytest.approx(2.100001)
    assert math.isnan(HostEnergy(tmp_path / "elsewhere").read())


def test_the_clock_measures_blocks_with_gradients() -> None:
    now = [0.0]

    class Block(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            now[0] += 3.0
            return x

    def waits(*_: object) -> None:
        now[0] += 100.0

    blocks = [Block(), Block()]
    for block in blocks:  # as FSDP registers its hooks, before
        block.register_forward_pre_hook(waits, prepend=True)
        block.register_forward_hook(waits)
    clock = ComputeClock(blocks, torch.device("cpu"), lambda: now[0])
    x = torch.zeros(1)
    for _ in range(2):  # steps, of two micro-batches
        for _ in range(2):
            blocks[1](blocks[0](x))
        clock.step_done()
    with torch.no_grad():
        blocks[1](blocks[0](x))
    assert clock.take() == 12.0
    assert math.isnan(clock.take())
