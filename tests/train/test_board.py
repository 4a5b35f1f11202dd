"""TensorBoard: every column has its group, and runs can be compared by their settings."""

from __future__ import annotations

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from lit_gpt.train.settings import TrackerSettings
from lit_gpt.train.trackers import COLUMNS, Trackers, tag


@pytest.mark.parametrize(
    ("column", "shown"),
    [
        ("loss", "train/loss"), ("grad_norm", "train/grad_norm"), ("val_loss", "val/loss"),
        ("val_bits_per_byte", "val/bits_per_byte"), ("mfu", "speed/mfu"), ("save_s", "speed/save_s"),
        ("memory_gib", "device/memory_gib"), ("power_w", "device/power_w"),
    ],
)  # fmt: skip
def test_groups(column: str, shown: str) -> None:
    assert tag(column) == shown


def test_what_is_of_a_device() -> None:
    columns = [column for column in COLUMNS if column not in ("step", "time", "attempt")]
    assert [column for column in columns if tag(column).startswith("device/")] == [
        "memory_gib", "gpu_clock_mhz", "gpu_temperature_c", "gpu_power_w", "throttled_gpus", "gpu_energy_j",
        "host_energy_j", "joules_per_token",
    ]  # fmt: skip


@pytest.mark.slow
def test_scalars_and_hyperparameters(tmp_path: Path) -> None:
    """Paths are of a machine, and None is no value: both are left out."""
    settings = {"learning_rate": 0.5, "seed": 7, "compile": None, "packing": "window", "out_dir": "/home/me/run"}
    trackers = Trackers(tmp_path, 0, TrackerSettings(), settings, attempt=0)
    trackers.log({"step": 1, "loss": 2.5, "val_loss": 3.5})
    trackers.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == ["train/loss", "val/loss"]
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 2.5)]
    content = events.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    found = HParamsPluginData.FromString(content).session_start_info.hparams
    assert {name: value.number_value or value.string_value for name, value in found.items()} == {
        "learning_rate": 0.5, "seed": 7, "packing": "window",
    }  # fmt: skip
