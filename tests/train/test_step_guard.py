"""The step guard: harmful updates are skipped and recorded, and a resume skips them again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from lit_gpt.datapoints.run_record import RunRecord
from lit_gpt.train.settings import SpikeSettings
from lit_gpt.train.step_guard import StepGuard, Verdict
from tests.support.programs import environment, run_program
from tests.support.training import command, full_state, metrics, seen_rows, train

FAULTY = Path(__file__).parents[1] / "support" / "faulty_training.py"
INF, NAN = float("inf"), float("nan")


def judged(guard: StepGuard, norms: list[float]) -> list[Verdict]:
    return [Verdict(int(guard.judge(torch.tensor(norm)))) for norm in norms]


def faulty(store: Path, out: Path, faults: str, *, expect: int = 0, **settings: object) -> str:
    """Run the training program with faults; what it logged."""
    done = run_program(
        command(store, out, program=FAULTY, keep_last_checkpoints=0, **settings), env=environment(FAULTS=faults),
        fresh=settings.get("devices", 1) != 1,
    )  # fmt: skip
    assert done.returncode == expect, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def skipped(run: Path) -> list[tuple[int, str, int, int]]:
    """(step, reason, first slot, rows) of the record's deviations."""
    with RunRecord(run / "datapoints") as record:
        return [(d["step"], d["reason"], d["first_slot"], d["rows"]) for d in record.deviations()]


def test_not_finite() -> None:
    guard = StepGuard(SpikeSettings(), torch.device("cpu"))
    assert judged(guard, [1.0, NAN, INF, 1e30]) == [0, Verdict.NOT_FINITE, Verdict.NOT_FINITE, 0]


def test_spikes() -> None:
    """Window 4, factor 10. The lower median is finite once two norms are there; what was skipped does not enter."""
    guard = StepGuard(SpikeSettings(spike_policy="skip", spike_window_steps=4), torch.device("cpu"))
    assert judged(guard, [1.0, 100.0]) == [0, 0]  # nothing is usual yet: medians inf, inf
    assert judged(guard, [1001.0, 999.0]) == [Verdict.SPIKE, 0]  # of (1, 100): the median of (inf, inf, 1, 100) is 100
    assert judged(guard, [2.0, NAN]) == [0, Verdict.NOT_FINITE]  # (1, 100, 999, 2): median 2
    assert judged(guard, [20.1, 20.0]) == [Verdict.SPIKE, 0]


def test_state_survives_json() -> None:
    settings = SpikeSettings(spike_policy="skip", spike_window_steps=4)
    guard, resumed = (StepGuard(settings, torch.device("cpu")) for _ in range(2))
    judged(guard, [0.1, 0.2, 0.3])
    resumed.load(json.loads(json.dumps(guard.state())))
    assert judged(guard, [2.1, 1.9]) == judged(resumed, [2.1, 1.9]) == [Verdict.SPIKE, 0]


def test_gives_up_after_so_many_in_a_row() -> None:
    guard = StepGuard(SpikeSettings(max_skipped_steps=2), torch.device("cpu"))
    for step, norm in enumerate([NAN, 1.0, NAN, NAN, 1.0], 1):
        value = torch.tensor(norm)
        guard.note(step, 8 * step, 8, guard.judge(value), value)
        found = guard.read()
        assert [entry.step for entry in found] == ([step] if norm is NAN else [])
        assert guard.gave_up == (step >= 4)
    assert guard.skipped == 3


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nan_activation", "inf_gradient"])
def test_one_bad_step(store: Path, tmp_path: Path, kind: str) -> None:
    """The step before the save at 8: state and rows go on, the checkpoint before and after differ by three updates."""
    log = faulty(store, tmp_path, f"7:0:{kind}", log_interval_steps=3)
    assert "step 7: update skipped (not_finite" in log
    assert skipped(tmp_path) == [(7, "not_finite", 48, 8)]
    assert [line["skipped_steps"] for line in metrics(tmp_path)] == ["0", "0", "1", "1"]
    assert sorted(seen_rows(tmp_path)) == list(range(1, 13))
    updates = [full_state(tmp_path, step)["optimizer.lm_head.weight.step"].item() for step in (4, 8, 12)]
    assert updates == [4, 7, 11]
    assert all(torch.isfinite(value).all() for value in full_state(tmp_path, 12).values())
    # an undisturbed resume from step 8 is the same run: the decision was made from state that the checkpoint holds
    again = tmp_path / "again"
    shutil.copytree(tmp_path, again, ignore=shutil.ignore_patterns("again"))
    shutil.rmtree(again / "iter-00000012-ckpt.pth")
    train(store, again, resume="auto", log_interval_steps=3)
    assert metrics(again) == metrics(tmp_path)
    assert skipped(again) == skipped(tmp_path)
    got, wanted = full_state(again, 12), full_state(tmp_path, 12)
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


@pytest.mark.slow
def test_the_run_gives_up(store: Path, tmp_path: Path) -> None:
    """Three in a row of which the log hears at step 8: exit code 3, one line, and a checkpoint of good weights."""
    faults = " ".join(f"{step}:0:nan_activation" for step in range(5, 13))
    log = faulty(
        store, tmp_path, faults, expect=3, max_skipped_steps=3, log_interval_steps=100, eval_interval_steps=100
    )
    assert "gave up after step 8, saved: 3 updates in a row were skipped (--max_skipped_steps)" in log
    before, after = full_state(tmp_path, 4), full_state(tmp_path, 8)
    assert all(torch.equal(before[name], after[name]) for name in before)
    train(store, tmp_path, resume="auto", keep_last_checkpoints=0)  # the machine was repaired
    assert metrics(tmp_path)[-1]["skipped_steps"] == "4"


@pytest.mark.slow
def test_a_spike_is_skipped(store: Path, tmp_path: Path) -> None:
    settings = dict(spike_policy="skip", spike_factor=5, spike_window_steps=4)
    faulty(store, tmp_path / "skip", "6:0:gradient_x100", **settings)
    assert skipped(tmp_path / "skip") == [(6, "spike", 40, 8)]
    assert full_state(tmp_path / "skip", 12)["optimizer.lm_head.weight.step"].item() == 11
    faulty(store, tmp_path / "none", "6:0:gradient_x100")
    assert skipped(tmp_path / "none") == []


@pytest.mark.slow
def test_a_resume_knows_the_usual_norm(store: Path, tmp_path: Path) -> None:
    """A spike right after the checkpoint: by the norms that the checkpoint holds the resumed run skips it too."""
    settings = dict(spike_policy="skip", spike_factor=5, spike_window_steps=4)
    faulty(store, tmp_path / "unbroken", "9:0:gradient_x100", **settings)
    shutil.copytree(tmp_path / "unbroken", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "iter-00000012-ckpt.pth")
    faulty(store, tmp_path / "resumed", "9:0:gradient_x100", resume="auto", **settings)
    assert skipped(tmp_path / "resumed") == skipped(tmp_path / "unbroken") == [(9, "spike", 64, 8)]
    assert metrics(tmp_path / "resumed") == metrics(tmp_path / "unbroken")
    got, wanted = full_state(tmp_path / "resumed", 12), full_state(tmp_path / "unbroken", 12)
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
