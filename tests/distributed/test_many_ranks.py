"""What the control of a run costs with more ranks: 4, 8 and 32 gloo processes; its messages and its lines are counted.

Each run saves, on disk and in memory, validates, and is stopped by a signal to its last rank; it is resumed, and its
last rank is killed; it is resumed again, and its last rank fails.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support.programs import ROOT, run_ranks
from tests.support.training import command

pytestmark = [pytest.mark.distributed, pytest.mark.long]
PROGRAM = ROOT / "tests" / "support" / "counted_training.py"
TO_EACH = ("all_reduce", "all_gather", "all_gather_object", "barrier")
"""Of these, gloo sends each rank messages of each other rank."""
OF_THE_DEVICE = {"lit_gpt.train.trainer all_reduce", "lit_gpt.train.validation all_reduce"}
"""Sums of losses, which are NCCL's on GPUs: one for each line of metrics, and for each validation."""
OF_TIME = ("waiting for ", "training waits for ", "first step done ", "may stay as it was")
"""In lines that depend on how fast the machine is."""


class Told(NamedTuple):
    code: int
    lines: list[str]
    calls: list[Counter[str]]
    """Of each rank that ended by itself."""


def run(store: Path, folder: Path, ranks: int, faults: str) -> Told:
    settings = dict(
        devices=ranks, global_batch_size=32, micro_batch_size=32 // ranks, max_steps=9, warmup_steps=1, resume="auto",
        save_interval_steps=3, eval_interval_steps=4, log_interval_steps=1, max_epochs=9,
        memory_checkpoint_dir=folder / "memory", memory_checkpoint_steps=2,
    )  # fmt: skip
    counts = folder / f"counts-{faults}"
    flags = command(store, folder / "run", program=PROGRAM, **settings)
    done = run_ranks(flags, ranks, timeout_s=3000, FAULTS=faults, COUNTS=str(counts))
    lines = [line for line in done.stderr.splitlines() if not any(words in line for words in OF_TIME)]
    files = sorted(folder.glob(f"{counts.name}.*"), key=lambda path: int(path.suffix[1:]))
    return Told(done.returncode, lines, [Counter(json.loads(file.read_text())) for file in files])


@pytest.fixture(scope="module")
def told(store: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Told]]:
    """By the number of ranks, the three runs."""
    found = {}
    for ranks in (4, 8, 32):
        folder = tmp_path_factory.mktemp(f"ranks-{ranks}")
        last = ranks - 1
        found[ranks] = [run(store, folder, ranks, f"{step}:{last}:{kind}") for step, kind in FAULTS]
    return found


FAULTS = ((5, "term"), (8, "kill"), (9, "error"))


def test_lines_do_not_grow_with_the_ranks(told: dict[int, list[Told]]) -> None:
    for runs in zip(*told.values(), strict=True):
        few, *more = runs
        for many in more:
            assert len(many.lines) == len(few.lines), "\n".join([*few.lines, "", *many.lines])


def test_no_call_of_the_control_depends_on_the_number_of_ranks(told: dict[int, list[Told]]) -> None:
    stopped = {ranks: runs[0] for ranks, runs in told.items()}
    assert [run.code for run in stopped.values()] == [0, 0, 0]
    assert [len(run.calls) for run in stopped.values()] == list(stopped)
    first, *others = (run.calls[0] for run in stopped.values())
    assert sum(first.values()) > 50
    assert all(other == first for other in others), (first, others)
    for run in stopped.values():
        assert all(calls == run.calls[1] for calls in run.calls[2:]), "all ranks but the first make the same"


def test_no_message_of_the_control_goes_from_each_rank_to_each(told: dict[int, list[Told]]) -> None:
    """Steps 1 to 5 have a line of metrics each, and one validation, of one sum."""
    (calls, *_) = told[32][0].calls
    to_each = {call: number for call, number in calls.items() if call.endswith(TO_EACH)}
    assert to_each == dict(zip(sorted(OF_THE_DEVICE), (5, 1), strict=True))
