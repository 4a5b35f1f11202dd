"""Weights & Biases and TensorBoard show what metrics.csv shows, also after a run went back past what it had sent."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_gpt.train.sent_steps import ID_FILE, SentSteps, branch_hash
from lit_gpt.train.settings import Settings
from tests.support.programs import environment, run_program
from tests.support.training import command, metrics, train
from tests.train.test_rollback import ROLLBACK, SPIKE
from tests.train.test_step_guard import FAULTY
from tests.train.test_trackers import offline_series

A, B = "a" * 16, "b" * 16


def begin(run_dir: Path, resume_step: int, branch: str = A, **changes: object) -> SentSteps:
    options = dict(goes_back=False, last_line=0, project="one") | changes
    sent = SentSteps.begin(run_dir, resume_step, branch, **options)  # type: ignore[arg-type]
    assert sent is not None
    return sent


def test_a_resume_after_a_crash_goes_on_with_its_run(tmp_path: Path) -> None:
    first = begin(tmp_path, 0)
    first.note(9)
    for _ in range(2):  # the second start was killed before it reached step 9
        again = begin(tmp_path, 4)
        assert (again.run_id, again.step) == (first.run_id, 9)


@pytest.mark.parametrize("change", [dict(goes_back=True), dict(branch=B), dict(branch=B, project=None)])
def test_a_start_that_goes_another_way_gets_a_new_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, change: dict[str, object]
) -> None:
    """Also if Weights & Biases is off just then; and from there on it is a run like any other."""
    first = begin(tmp_path, 0)
    first.note(9)
    second = begin(tmp_path, 4, **change)  # type: ignore[arg-type]
    assert second.run_id != first.run_id
    assert second.step == 0
    assert caplog.text.count(f"run {first.run_id} was sent steps up to 9, and this start goes another way") == 1
    second.note(6)
    third = begin(tmp_path, 4, branch=str(change.get("branch", A)))
    assert (third.run_id, third.step) == (second.run_id, 6)


def test_a_change_from_the_last_sent_step_on_keeps_the_run(tmp_path: Path) -> None:
    first = begin(tmp_path, 0)
    first.note(12)
    assert begin(tmp_path, 12, branch=B).run_id == first.run_id
    begin(tmp_path, 12, branch=B).note(20)
    assert begin(tmp_path, 16, branch=A).run_id != first.run_id


def test_another_project_gets_the_whole_series(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Also after a clean stop; not from a file that says no project, nor while Weights & Biases is off."""
    first = begin(tmp_path, 0, project="eins zwei/3")
    first.note(4)
    assert begin(tmp_path, 4, project="eins zwei/3").run_id == first.run_id
    assert begin(tmp_path, 4, project=None).run_id == first.run_id
    second = begin(tmp_path, 4, project="other")
    assert second.run_id != first.run_id
    assert second.step == 0
    assert "the project is other now, no longer eins zwei/3" in caplog.text
    (tmp_path / ID_FILE).write_text(f"0badc0de\n{4:020d}\n{A}\n")
    assert begin(tmp_path, 4, project="third").run_id == "0badc0de"
    assert begin(tmp_path, 4, project="fourth").run_id != "0badc0de"


def test_files_of_an_earlier_version_and_damaged_ones(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / ID_FILE
    assert SentSteps.begin(tmp_path, 4, A, goes_back=True, last_line=9, project=None) is None
    path.write_text("0badc0de")
    kept = begin(tmp_path, 4, last_line=9)
    assert (kept.run_id, kept.step) == ("0badc0de", 9)
    path.write_text("0badc0de")
    assert begin(tmp_path, 4, last_line=9, goes_back=True).run_id != "0badc0de"
    whole = path.read_bytes()
    for bit in range(8 * len(whole)):
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        begin(tmp_path, 4)
    path.write_bytes(bytes(20))
    assert begin(tmp_path, 4).step == 0
    assert f"{path} is damaged" in caplog.text


def test_a_file_that_cannot_be_written_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sent = begin(tmp_path, 0)
    (tmp_path / ID_FILE).unlink()
    (tmp_path / ID_FILE).symlink_to("/dev/full")
    for step in range(1, 4):
        sent.note(step)
    assert caplog.text.count("cannot be written") == 1


def test_what_counts_as_another_way() -> None:
    settings = Settings()
    same = replace(settings, devices=8, micro_batch_size=1, out_dir="x", wandb="online", save_interval_steps=7)
    assert branch_hash(same, {"seed": 1}) == branch_hash(settings, {"seed": 1})
    others = [
        replace(settings, learning_rate=1.0),
        replace(settings, weight_decay=0.0),
        replace(settings, float8="rowwise"),
    ]
    hashes = {branch_hash(other, {"seed": 1}) for other in others} | {branch_hash(settings, {"seed": 2})}
    assert len(hashes - {branch_hash(settings, {"seed": 1})}) == 4


def shown(run_dir: Path) -> tuple[dict[int, float], dict[int, float]]:
    """step -> loss, in the newest run at Weights & Biases, and in TensorBoard."""
    run_id = (run_dir / ID_FILE).read_text().split()[0]
    series = offline_series(run_dir, run_id)
    assert len({step for step, _ in series}) == len(series), "a step twice"
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return dict(series), {event.step: event.value for event in events.Scalars("train/loss")}


def assert_shown(run_dir: Path) -> None:
    """Losses are 64 bits in Weights & Biases and 32 in TensorBoard."""
    losses = {int(line["step"]): float(line["loss"]) for line in metrics(run_dir)}
    sent, board = shown(run_dir)
    assert sent == losses
    assert board == pytest.approx(losses, rel=1e-6)


BOTH = dict(wandb="offline", tensorboard="true", keep_last_checkpoints=0)


@pytest.mark.slow
def test_a_run_that_is_wound_back(store: Path, tmp_path: Path) -> None:
    """From step 12 back to 4, with another learning rate, to step 8 only."""
    train(store, tmp_path, **BOTH)
    assert_shown(tmp_path)
    before = {int(line["step"]): float(line["loss"]) for line in metrics(tmp_path)}
    older = tmp_path / "iter-00000004-ckpt.pth"
    done = train(store, tmp_path, resume=older, learning_rate=1e-2, max_steps=8, warmup_steps=2, **BOTH)
    assert len(re.findall("Weights & Biases: run .* takes its place, filled from metrics.csv", done.stderr)) == 1
    assert [int(line["step"]) for line in metrics(tmp_path)] == list(range(1, 9))
    assert_shown(tmp_path)
    sent, _ = shown(tmp_path)
    assert {step for step in sent if sent[step] == before[step]} == {1, 2, 3, 4, 5}  # 5 is of the weights of step 4


@pytest.mark.slow
def test_a_run_that_rolled_back(store: Path, tmp_path: Path) -> None:
    done = run_program(command(store, tmp_path, program=FAULTY, **BOTH, **ROLLBACK), env=environment(FAULTS=SPIKE))
    assert done.returncode == 0, done.stderr
    assert "back from step 6 to step 4" in done.stderr
    assert done.stderr.count("takes its place, filled from metrics.csv") == 1
    assert_shown(tmp_path)
