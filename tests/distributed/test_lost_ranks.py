"""Two ranks, of which one is killed, stopped, fails or refuses its input: both end soon, and one line says why.

`pytest -rP -m long tests/distributed/test_lost_ranks.py` prints for each fault and moment what was told, and when.
"""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest

from tests.support.programs import ROOT, environment
from tests.support.training import command

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

FAULTY = ROOT / "tests/support/faulty_training.py"
TOLD = {
    "kill": "ended without a word", "stop": "was silent for", "error": "cannot go on: OSError: [Errno 5]",
    "bad_input": "cannot go on: a shard has gone",
}  # fmt: skip
CODES = {"kill": (1, -9), "stop": (1, -9), "error": (1,), "bad_input": (2,)}
"""Of rank 0, which starts the other; if it is itself killed, that."""


def check(store: Path, out: Path, moment: str, rank: int, kind: str, **settings: object) -> None:
    run = command(
        store, out, program=FAULTY, devices=2, micro_batch_size=2, eval_interval_steps=2, save_interval_steps=3,
        silent_rank_s=15, **settings,
    )  # fmt: skip
    process = subprocess.Popen(
        run, env=environment(FAULTS=f"{moment}:{rank}:{kind}"), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    lines: list[tuple[float, str]] = []
    assert process.stderr
    for line in process.stderr:  # to the end of both ranks, which share it
        lines.append((time.monotonic(), line.rstrip()))
    code, log = process.wait(timeout=60), "\n".join(line for _, line in lines)
    assert code in CODES[kind], log
    told = [(at, line) for at, line in lines if TOLD[kind] in line and ("all ranks end" in line)]
    assert len(told) == 1, log
    assert f"rank {rank} on " in told[0][1]
    ended = time.monotonic() - told[0][0]
    print(f"{kind:9} rank {rank} {moment:8} exit code {code}, ended {ended:.1f} s after: {told[0][1][20:]}")
    assert log.count("Traceback") == (kind == "error"), "only that of the rank that fails"


@pytest.mark.timeout(400)
@pytest.mark.parametrize(("moment", "rank", "kind"), [("2", 1, "stop"), ("validate", 0, "kill")])
def test_one_line_tells_the_cause_and_all_end(store: Path, tmp_path: Path, moment: str, rank: int, kind: str) -> None:
    check(store, tmp_path / "run", moment, rank, kind)


@pytest.mark.long
@pytest.mark.parametrize("kind", list(TOLD))
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("moment", ["start", "2", "save", "validate"])
def test_every_fault_at_every_moment(store: Path, tmp_path: Path, moment: str, rank: int, kind: str) -> None:
    check(store, tmp_path / "run", moment, rank, kind)
