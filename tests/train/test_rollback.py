"""`--spike_policy rollback`: back to the checkpoint before a spike, and on without the rows that led to it.

The store's rows 0 to 95 are 12 steps of 8; checkpoints after 4, 8 and 12. The row of slot 40, in step 6, spikes. With
--rollback_steps 2 the rows of steps 5 and 6 go: slots 32 to 47, so that steps 5 to 12 see slots 48 to 111.
"""

from __future__ import annotations

import json
import math
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lit_gpt.checkpoint.checkpoint import model_tensors, verified
from lit_gpt.checkpoint.record import Checkpoint
from lit_gpt.data.loader import step_stretches
from lit_gpt.datapoints.attempts import Attempt, Mark, is_in_lineage
from lit_gpt.datapoints.query import Replay
from lit_gpt.datapoints.run_record import RunRecord
from lit_gpt.train.rollback import Rollbacks
from lit_gpt.train.settings import SpikeSettings
from lit_gpt.train.step_guard import SkippedStep, Verdict
from tests.support.programs import ROOT, environment, run_program
from tests.support.training import command, full_state, metrics, train
from tests.train.test_step_guard import FAULTY, faulty

ROLLBACK = dict(spike_policy="rollback", spike_factor=5, spike_window_steps=4, rollback_steps=2)
SPIKE = "slot40:gradient_x100"
SEEN = [*range(0, 32, 8), *range(48, 112, 8)]
"""First slots of steps 1 to 12 after the rollback."""


def first_slots(run: Path) -> list[int]:
    with RunRecord(run / "datapoints") as record:
        return [step.first_slot for step in record.steps()]


def deviations(run: Path) -> list[tuple[str, int, int, int]]:
    """(kind, step, first slot, rows), of the lineage."""
    with RunRecord(run / "datapoints") as record:
        return [(d["deviation"], d["step"], d["first_slot"], d["rows"]) for d in record.deviations()]


def datapoints(run: Path, *query: str) -> subprocess.CompletedProcess[str]:
    return run_program([sys.executable, ROOT / "scripts/datapoints.py", *query, "--run_dir", run])


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    return dict(model_tensors(verified(run / f"iter-{step:08d}-ckpt.pth")))


@pytest.fixture(scope="module")
def rolled_back(store: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run with one rollback, and what it logged; tests only read it."""
    run = tmp_path_factory.mktemp("rolled-back")
    return run, faulty(store, run, SPIKE, **ROLLBACK)


@pytest.mark.slow
def test_a_spike_rolls_back(rolled_back: tuple[Path, str]) -> None:
    run, log = rolled_back
    assert log.count("the spike at step 6: back from step 6 to step 4, rows 32 to 47 will be left out") == 1
    assert first_slots(run) == SEEN
    assert deviations(run) == [("left_out", 5, 32, 16)]
    assert [int(line["step"]) for line in metrics(run)] == list(range(1, 13))
    assert all(math.isfinite(float(line["loss"])) for line in metrics(run))
    assert metrics(run)[-1]["skipped_steps"] == "0"  # the skipped update is not part of what the run is now
    state = full_state(run, 12)
    assert all(torch.isfinite(value).all() for value in state.values())
    assert state["optimizer.lm_head.weight.step"].item() == 12
    assert verified(run / "iter-00000012-ckpt.pth").facts["left_out"] == [[32, 48]]
    lines = [json.loads(line) for line in (run / "datapoints/steps.jsonl").read_text().splitlines()]
    told = next(line for line in lines if line.get("deviation") == "rollback")
    assert (told["step"], told["to_step"], told["first_slot"], told["rows"]) == (6, 4, 32, 16)


def test_the_record_stays_true(rolled_back: tuple[Path, str], tmp_path: Path) -> None:
    """Rows that are left out were seen by no step, `verify` agrees, and it misses the jump where the line is gone."""
    run, _ = rolled_back
    verify = datapoints(run, "verify")
    clean = "0 contradictions up to step 12, 96 rows; compared with the marks of 3 checkpoints\n"
    assert (verify.returncode, verify.stdout) == (0, clean), verify.stderr
    replay = Replay(run)
    assert [slot for slot in range(112) if replay.record.step_of(slot) is None] == list(range(32, 48))
    before_and_after = {seen.slot for step in (4, 5) for seen in replay.step(step)}
    assert before_and_after == {*range(24, 32), *range(48, 56)}
    lost = {seen.document for seen in replay.seen_in(replay.record.step(5)._replace(first_slot=40))}
    visits = [seen for document in lost for seen in replay.document(document)]
    assert visits
    assert not {seen.slot for seen in visits} & set(range(32, 48))
    forged = tmp_path / "forged"
    shutil.copytree(run, forged)
    log = forged / "datapoints/steps.jsonl"
    log.write_text("".join(line for line in log.read_text().splitlines(True) if '"left_out"' not in line))
    verify = datapoints(forged, "verify")
    assert verify.returncode == 1
    assert "step 5 begins at row 48, the step before it ended at row 32" in verify.stdout


@pytest.mark.slow
def test_killed_after_the_rollback(store: Path, rolled_back: tuple[Path, str], tmp_path: Path) -> None:
    """Killed at step 6 the second time, before any save; the resume meets no fault, and leaves the rows out as well."""
    done = run_program(
        command(store, tmp_path, program=FAULTY, keep_last_checkpoints=0, **ROLLBACK),
        env=environment(FAULTS=f"{SPIKE} slot56:kill"),
    )
    assert done.returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.glob("iter-*")] == ["iter-00000004-ckpt.pth"]
    train(store, tmp_path, resume="auto", keep_last_checkpoints=0, **ROLLBACK)
    run, _ = rolled_back
    assert first_slots(tmp_path) == SEEN
    assert deviations(tmp_path) == deviations(run)
    assert metrics(tmp_path) == metrics(run)
    got, wanted = full_state(tmp_path, 12), full_state(run, 12)
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    assert datapoints(tmp_path, "verify").returncode == 0


@pytest.mark.distributed
def test_two_processes_go_back_together(store: Path, rolled_back: tuple[Path, str], tmp_path: Path) -> None:
    """The row is rank 1's alone, the checkpoint is sharded, the verdict is read two steps late: at step 8."""
    settings = dict(ROLLBACK, devices=2, micro_batch_size=4, log_interval_steps=4, eval_interval_steps=12)
    log = faulty(store, tmp_path, "slot44:gradient_x100", **settings)
    assert log.count("the spike at step 6: back from step 8 to step 4, rows 32 to 47 will be left out") == 1
    assert first_slots(tmp_path) == SEEN
    assert deviations(tmp_path) == [("left_out", 5, 32, 16)]
    assert datapoints(tmp_path, "verify").returncode == 0
    one = weights(rolled_back[0], 12)
    for name, value in weights(tmp_path, 12).items():  # the same rows; sums in another order, as test_strategies.py
        assert (value - one[name]).norm() <= 2e-4 * one[name].norm(), name


@pytest.mark.slow
def test_the_cap(store: Path, tmp_path: Path) -> None:
    """A second spike after one rollback: skipped, saved, exit code 3; a resume with a higher cap goes back for it."""
    faults = f"{SPIKE} slot64:gradient_x100"  # in step 7 after the first rollback
    log = faulty(store, tmp_path, faults, expect=3, max_rollbacks=1, **ROLLBACK)
    assert "gave up after step 7, saved: a spike came after 1 rollbacks (--max_rollbacks)" in log
    assert deviations(tmp_path) == [("left_out", 5, 32, 16), ("skipped", 7, 64, 8)]
    log = faulty(store, tmp_path, "slot72:gradient_x100", resume="auto", **ROLLBACK)
    assert "the spike at step 8: back from step 8 to step 7, rows 72 to 79 will be left out" in log
    assert first_slots(tmp_path) == [*range(0, 32, 8), 48, 56, 64, *range(80, 120, 8)]
    assert datapoints(tmp_path, "verify").returncode == 0


@pytest.mark.slow
def test_without_a_checkpoint_it_skips(store: Path, tmp_path: Path) -> None:
    log = faulty(store, tmp_path, "slot24:gradient_x100", **ROLLBACK)  # in step 4, which is saved only afterwards
    assert "step 4: no checkpoint of this run to roll back to: the update is skipped, no more" in log
    assert deviations(tmp_path) == [("skipped", 4, 24, 8)]
    assert first_slots(tmp_path) == list(range(0, 96, 8))


def test_which_rows_go() -> None:
    """Up to the last spike's, from `rollback_steps` before the first, but none that the checkpoint has seen."""

    def skipped(step: int, verdict: Verdict) -> SkippedStep:
        return SkippedStep(step, 8 * (step - 1), 8, verdict, 1.0)

    rollbacks = Rollbacks(SpikeSettings(spike_policy="rollback", rollback_steps=3, max_rollbacks=2))
    found = rollbacks.spikes([skipped(19, Verdict.NOT_FINITE), skipped(20, Verdict.SPIKE), skipped(22, Verdict.SPIKE)])
    assert [entry.step for entry in found] == [20, 22]
    for slot, first_slot in ((80, 136), (144, 144)):  # 8 * (20 - 3) = 136
        assert rollbacks.plan(found, Checkpoint(Path(), {}), slot)[2:] == (first_slot, 176)
    rollbacks.add([(136, 176)])
    rollbacks.add([[136, 176], [8, 16]])  # as JSON gives them back; one is known
    assert rollbacks.left_out == [(8, 16), (136, 176)]
    assert rollbacks.spikes([skipped(30, Verdict.NOT_FINITE)]) == []
    assert not rollbacks.exhausted
    assert rollbacks.spikes([skipped(30, Verdict.SPIKE)]) == []
    assert rollbacks.exhausted


@pytest.mark.parametrize(
    ("first_slot", "left_out", "starts"),
    [
        (0, [], [0, 8, 16, 24, 32]),
        (8, [(16, 24)], [8, 24, 32]),
        (0, [(24, 32), (8, 16)], [0, 16, 32]),
        (16, [(0, 8), (8, 24)], [24, 32]),  # one is past, into the other the run was wound back
        (0, [(8, 24), (16, 32)], [0, 32]),
        (0, [(12, 20)], [0, 20, 28]),  # of another batch size: no step touches the range
        (0, [(32, 400)], [0, 8, 16, 24]),
        (0, [(80, 88)], [0, 8, 16, 24, 32]),
    ],
)  # fmt: skip
def test_steps_around_what_is_left_out(first_slot: int, left_out: list[tuple[int, int]], starts: list[int]) -> None:
    """Of 42 rows, in steps of 8: the last two are too few."""
    assert [slot for stretch in step_stretches(first_slot, 8, 42, left_out) for slot in stretch] == starts


def test_a_checkpoint_of_another_future_is_none_to_go_back_to() -> None:
    """Attempt 1 went on from step 4 of attempt 0, which had come to step 8; attempt 2 from step 6 of attempt 1."""

    def attempt(number: int, parent: Mark | None) -> Attempt:
        return Attempt(number, parent, parent is not None, 0, "", {}, {})

    parents = [None, Mark(0, 4, 0, ""), Mark(1, 6, 0, "")]
    attempts = [attempt(number, parent) for number, parent in enumerate(parents)]
    marks = [(0, 4), (0, 8), (1, 5), (1, 6), (1, 7), (2, 7)]
    known = [place for place in marks if is_in_lineage(Mark(*place, 0, ""), attempts)]
    assert known == [(0, 4), (1, 5), (1, 6), (2, 7)]
