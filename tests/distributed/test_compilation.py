"""All that is compiled is compiled by the end of the first step, on every rank: later, all would wait for that rank."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.support.programs import ROOT, environment
from tests.support.training import command, metrics

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.mark.parametrize("devices", [1, 2])
def test_nothing_is_compiled_after_the_first_step(store: Path, tmp_path: Path, devices: int) -> None:
    """Through two validations. A block has one graph with gradients and one without, the loss one for both."""
    program = ROOT / "tests" / "support" / "compiled_training.py"
    settings = dict(devices=devices, compile="true", packing="bestfit", micro_batch_size=4 // devices)
    done = subprocess.run(
        command(store, tmp_path / "run", program=program, **settings),
        env=environment(GRAPHS=str(tmp_path / "graphs")), capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for rank in range(devices):
        graphs = [int(line) for line in (tmp_path / f"graphs.{rank}").read_text().splitlines()]
        assert graphs == [3] * 12
    assert sum(row["val_loss"] != "" for row in metrics(tmp_path / "run")) == 2
