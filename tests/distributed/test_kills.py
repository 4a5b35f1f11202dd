"""Training that is killed again and again, at random moments, is the training that nobody killed.

30 series of 10 SIGKILLs: one and two processes, both kinds of checkpoint and those in node memory, saved beside the
training every second step.
A seed gives each moment: so many steps after the resume, some milliseconds more, and which ranks. Of two processes, one
that is left must end by itself. Where the kill comes late, since the machine has much to do, the training waits for it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from lit_gpt.checkpoint.checkpoint import verified
from tests.distributed.test_saving import ranks_of, wait_until_gone
from tests.support.programs import ROOT, environment, run_program
from tests.support.training import command, metrics, seen_rows, train
from tests.train.test_step_guard import FAULTY

pytestmark = [pytest.mark.distributed, pytest.mark.long]

KILLS, MOST_STEPS, MOST_DELAY_S = 10, 8, 0.05
LATE = 12
"""Steps that a training does at most beyond the moment; they take some 10 ms."""
STEPS = 240
"""No life reaches the end."""
assert KILLS * (MOST_STEPS + LATE) < STEPS
SETTINGS = dict(
    max_steps=STEPS, max_epochs=100, warmup_steps=20, save_interval_steps=2, eval_interval_steps=50, async_save="true",
    micro_batch_size=2,
)  # fmt: skip


@pytest.fixture(scope="module", params=[1, 2], ids=["one process", "two processes"])
def unbroken(store: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> tuple[int, Path]:
    """Number of processes, and the run that nobody killed."""
    out = tmp_path_factory.mktemp("unbroken")
    train(store, out, devices=request.param, **SETTINGS | {"save_interval_steps": STEPS})
    return request.param, out


def logged(run: Path) -> int:
    """Whole lines of the datapoint log, of all lives."""
    path = run / "datapoints" / "steps.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def live_and_die(arguments: list[str], run: Path, log: Path, steps: int, delay_s: float, killed: list[int]) -> None:
    """Start the program and kill the ranks `killed`, `delay_s` after it has done so many steps."""
    until = logged(run) + steps
    saved = [*run.glob("iter-*"), *run.parent.glob("memory/run-*/*/iter-*")]
    last = max((int(path.name.split("-")[1]) for path in saved), default=0) + steps + LATE
    with log.open("a") as stderr:
        process = subprocess.Popen(arguments, env=environment(FAULTS=f"{last}:0:wait"), stderr=stderr)
        deadline = time.monotonic() + 600  # of which a machine with much to do may need some
        while logged(run) < until:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, "no steps"
            time.sleep(0.002)
        time.sleep(delay_s)
        ranks = ranks_of(process.pid)
        for rank in killed:
            os.kill(ranks[rank], signal.SIGKILL)
        assert process.wait(timeout=600) != 0, "it ended before it could be killed"
    wait_until_gone(ranks[1:])


@pytest.mark.parametrize("kind", ["full", "sharded", "in memory"])
@pytest.mark.parametrize("seed", range(5))
def test_ten_kills_change_nothing(
    store: Path, unbroken: tuple[int, Path], tmp_path: Path, seed: int, kind: str
) -> None:
    processes, whole = unbroken
    random = np.random.default_rng([seed, processes, ["sharded", "full", "in memory"].index(kind)])
    run, log = tmp_path / "run", tmp_path / "log"
    settings = dict(SETTINGS, devices=processes, state_dict_type="sharded" if kind == "in memory" else kind)
    if kind == "in memory":
        settings |= dict(save_interval_steps=40, memory_checkpoint_dir=tmp_path / "memory", memory_checkpoint_steps=2)
    settings["resume"] = "auto"
    for _ in range(KILLS):
        moment = int(random.integers(1, MOST_STEPS + 1)), float(random.uniform(0, MOST_DELAY_S))
        killed = [[0], [1], [0, 1]][random.integers(3)] if processes == 2 else [0]
        live_and_die(command(store, run, program=FAULTY, **settings), run, log, *moment, killed)
    train(store, run, **settings)
    assert "Traceback" not in log.read_text() or processes == 2  # a rank that is left says what it lost
    assert metrics(run) == metrics(whole)
    assert seen_rows(run) == seen_rows(whole)
    verified(run / f"iter-{STEPS:08d}-ckpt.pth")
    verify = run_program([sys.executable, ROOT / "scripts/datapoints.py", "verify", "--run_dir", run])
    said = f"0 contradictions up to step {STEPS}, {8 * STEPS} rows; compared with the marks of 2 checkpoints\n"
    assert (verify.returncode, verify.stdout) == (0, said)
