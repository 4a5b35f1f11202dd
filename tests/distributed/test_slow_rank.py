"""A rank that computes longer than the others is named, and no other (point of measurement: compute_clock.py)."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from tests.support.programs import ROOT, run_ranks
from tests.support.training import command

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
PROGRAM = ROOT / "tests" / "support" / "slow_rank.py"


@pytest.mark.parametrize(("share", "named"), [(0.1, 1), (0.03, 0)])
def test_a_slow_rank_is_named_once(store: Path, tmp_path: Path, share: float, named: int) -> None:
    """Of 3, over two windows of 6 steps, with a validation between: rank 1 does 7 of 64 tokens twice, 1.11 times the
    work, or 2 of them, 1.03 times."""
    settings = dict(devices=3, micro_batch_size=1, global_batch_size=3, max_steps=14, log_interval_steps=2)
    flags = command(store, tmp_path, program=PROGRAM, **settings, save_interval_steps=14)
    done = run_ranks(flags, 3, SLOW=f"1:{share}", WINDOW="6")
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if "slow: " in line]
    assert len(lines) == named, done.stderr
    assert all("WARNING slow: rank 1 on " in line and " computes 1.11 times as long as " in line for line in lines)
    work = [1 + tokens / 64 for tokens in (0, 7 if named else 2, 0)]
    with (tmp_path / "ranks.csv").open(newline="") as file:
        ranks = list(csv.DictReader(file))
    assert [rank["rank"] for rank in ranks] == ["0", "1", "2"]
    compute = [float(rank["compute_s"]) for rank in ranks]
    assert [value / compute[0] for value in compute] == pytest.approx(work, rel=1e-4)  # written with 6 digits
    with (tmp_path / "metrics.csv").open(newline="") as file:
        *_, row = csv.DictReader(file)
    assert row["slowest_rank"] == "1"
    assert float(row["slowest_compute_s"]) / float(row["compute_s"]) == pytest.approx(work[1])
    assert float(row["longest_data_wait_s"]) >= float(row["data_wait_s"])
