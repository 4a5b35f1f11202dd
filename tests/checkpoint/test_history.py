"""Runs that went back: --resume auto follows the branch trained last, and other branches are never removed silently."""

from __future__ import annotations

import logging
import os
import re
import shutil
import signal
from pathlib import Path

import pytest

from lit_gpt.checkpoint.checkpoint import verified
from lit_gpt.checkpoint.history import find, left_behind, prune, tell_left_behind
from lit_gpt.checkpoint.record import Checkpoint, checkpoint_name
from lit_gpt.cli import BadInput
from lit_gpt.datapoints.attempts import Mark
from lit_gpt.datapoints.log import FOLDER, DatapointLog
from lit_gpt.train.rollback import last_good
from tests.checkpoint.test_checkpoint import facts, model_and_optimizer, save
from tests.support.programs import environment, run_program
from tests.support.training import command, metrics, train
from tests.train.test_step_guard import FAULTY


def go_on(run_dir: Path, start: Checkpoint | None, *saved: int, until: int) -> None:
    """An attempt that continues from `start` to step `until`, and saves some steps on the way."""
    mark = start.facts.get("datapoint_log") if start else None
    details = {"resumed_from": str(start.path) if start else None}
    with DatapointLog.open(
        run_dir / FOLDER, {"seed": 1}, parent=Mark(**mark) if mark else None, details=details
    ) as log:
        for step in range(start.step + 1 if start else 1, until + 1):
            log.append(step, 8 * (step - 1), 8, 60, digest=step)
            if step in saved:
                place = {"datapoint_log": log.flush_and_fsync()._asdict()}
                save(run_dir, facts(step) | place, *model_and_optimizer(step), full=True)


def present(run_dir: Path) -> list[int]:
    return sorted(int(path.name[5:13]) for path in run_dir.glob("iter-*"))


def steps(paths: list[Path]) -> list[int]:
    return [int(path.name[5:13]) for path in paths]


def auto(run_dir: Path) -> int:
    found = find("auto", run_dir)
    assert found is not None
    return found.step


@pytest.fixture
def wound_back(tmp_path: Path) -> Path:
    """A run that saved steps 4, 8 and 12, then continued from 4 and was killed at step 5."""
    go_on(tmp_path, None, 4, 8, 12, until=13)
    go_on(tmp_path, find(str(tmp_path / checkpoint_name(4)), tmp_path), until=5)
    return tmp_path


def test_auto_follows_the_branch_that_was_trained_last(wound_back: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert auto(wound_back) == 4
    assert steps(left_behind(wound_back)) == [12, 8]
    tell_left_behind(wound_back)
    assert "so --resume auto ignores them: iter-00000012-ckpt.pth, iter-00000008-ckpt.pth" in caplog.text
    go_on(wound_back, find("auto", wound_back), 6, until=7)
    assert auto(wound_back) == 6
    go_on(wound_back, find(str(wound_back / checkpoint_name(12)), wound_back), until=13)
    assert auto(wound_back) == 12
    assert steps(left_behind(wound_back)) == [6]
    go_on(wound_back, find("auto", wound_back), until=13)
    assert auto(wound_back) == 12


def test_a_resume_that_names_no_checkpoint_says_what_to_type(
    wound_back: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other, eight = tmp_path_factory.mktemp("other"), f"iter-{8:08d}-ckpt.pth"
    (other / "hf").mkdir()
    (other / "hf/config.json").touch()
    (other / "lit_model.pth").touch()
    (wound_back / eight / "MANIFEST.json").unlink()  # damaged, but still ours
    said = {
        str(wound_back): f"--out_dir {wound_back} --resume auto continues that run; --resume {wound_back}/iter",
        "8": f"did you mean --resume {other}/{eight}?",
        eight: f"did you mean --resume {other}/{eight}?",
        "latest": "did you mean --resume auto, which",
        "True": "did you mean --resume auto, which",
        str(other): "the run folder itself: --resume auto takes",
        str(other / "hf"): f"convert_hf_checkpoint.py --checkpoint_dir {other}/hf --destination_path {other}/iter-0000",
        str(other / "lit_model.pth"): f"convert_hf_checkpoint.py --checkpoint_dir {other}/lit_model.pth ",
        str(wound_back / eight / "state.pth"): "MANIFEST.json",
        "nowhere": f"no such checkpoint. In {other}: {eight}",
    }
    (other / eight).mkdir()
    for resume, words in said.items():
        with pytest.raises(BadInput, match=re.escape(words)):
            find(resume, other)


def test_a_rollback_stays_in_the_branch(wound_back: Path) -> None:
    go_on(wound_back, find("auto", wound_back), 6, until=14)
    for before, step in ((14, 6), (7, 6), (6, 4)):
        found = last_good(wound_back, before)
        assert found is not None
        assert found.step == step
    assert last_good(wound_back, 4) is None


def test_no_other_branch_stands_in(wound_back: Path) -> None:
    """With the only checkpoint of the branch damaged, neither a later one nor a fresh start is taken."""
    os.truncate(wound_back / checkpoint_name(4) / "state.pth", 100)
    wanted = r"no checkpoint .* is whole and of the branch trained last \(iter-00000012.*, iter-00000004-ckpt.pth\)"
    with pytest.raises(BadInput, match=wanted):
        find("auto", wound_back)
    assert find(str(wound_back / checkpoint_name(8)), wound_back).step == 8  # type: ignore[union-attr]


def test_retention_counts_the_branch_alone(wound_back: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Checkpoints of a branch left behind stay until the run has passed their step, and displace none of the run's."""
    with caplog.at_level(logging.WARNING):
        go_on(wound_back, find("auto", wound_back), 6, 7, until=7)
        prune(wound_back, 7, keep_last=2)
        assert present(wound_back) == [6, 7, 8, 12]
        assert not caplog.text
        go_on(wound_back, find("auto", wound_back), 9, until=9)
        prune(wound_back, 9, keep_last=2, keep_every_steps=8)
        assert present(wound_back) == [7, 8, 9, 12]
        prune(wound_back, 9, keep_last=2)
        assert present(wound_back) == [7, 9, 12]
        assert f"removing {wound_back / checkpoint_name(8)}: it is of a branch that the run has left" in caplog.text
        go_on(wound_back, find("auto", wound_back), 12, until=12)
    assert f"replacing {wound_back / checkpoint_name(12)}" in caplog.text
    assert auto(wound_back) == 12
    assert left_behind(wound_back) == []


def test_a_run_that_began_elsewhere_goes_back_there(wound_back: Path, tmp_path: Path) -> None:
    """Killed before its first save, it resumes from its origin; if that is gone, it is refused."""
    fork, origin = tmp_path / "fork", wound_back / checkpoint_name(8)
    go_on(fork, verified(origin), until=9)
    found = find("auto", fork)
    assert found is not None
    assert found.path == origin
    go_on(fork, found, 10, until=11)
    assert find("auto", fork).path == fork / checkpoint_name(10)  # type: ignore[union-attr]
    shutil.rmtree(fork / checkpoint_name(10))
    shutil.rmtree(origin)
    with pytest.raises(
        BadInput,
        match=r"fork has no whole checkpoint, and the one it began from is damaged: .*00000008.*not a checkpoint",
    ):
        find("auto", fork)


def test_an_imported_model_is_part_of_what_began_with_it(tmp_path: Path) -> None:
    """It has no mark in a log, and is not rolled back to, as it has no optimizer state."""
    imported = verified(save(tmp_path, facts(0), *model_and_optimizer(), full=True))
    go_on(tmp_path, imported, until=3)
    assert auto(tmp_path) == 0
    assert last_good(tmp_path, 3) is None
    go_on(tmp_path, imported, 4, until=5)
    assert auto(tmp_path) == 4
    shutil.rmtree(tmp_path / FOLDER)  # without a log every checkpoint counts
    assert auto(tmp_path) == 4


@pytest.mark.slow
def test_the_program_goes_on_where_it_was_wound_back_to(store: Path, tmp_path: Path) -> None:
    """From step 4 of 12 with another learning rate; killed at step 6, before its first save; then --resume auto."""
    train(store, tmp_path, keep_last_checkpoints=0)
    changed = dict(learning_rate=1e-3, keep_last_checkpoints=2)
    done = run_program(
        command(store, tmp_path, program=FAULTY, resume=tmp_path / checkpoint_name(4), **changed),
        env=environment(FAULTS="6:0:kill"),
    )
    assert done.returncode == -signal.SIGKILL
    assert "so --resume auto ignores them: iter-00000012-ckpt.pth, iter-00000008-ckpt.pth" in done.stderr
    log = train(store, tmp_path, resume="auto", **changed).stderr
    assert f"resumed from {tmp_path / checkpoint_name(4)}: step 4" in log
    for step in (8, 12):
        assert f"replacing {tmp_path / checkpoint_name(step)}" in log
        assert verified(tmp_path / checkpoint_name(step)).facts["settings"]["learning_rate"] == 1e-3
    assert present(tmp_path) == [8, 12]
    rates = [float(line["learning_rate"]) for line in metrics(tmp_path)]
    assert len(rates) == 12
    assert max(rates[4:]) <= 1e-3 < max(rates[:4])
