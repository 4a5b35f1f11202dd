"""A resume with nothing left to train: it says so, names the checkpoint that there is, and writes nothing."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest

from tests.support.training import train

pytestmark = pytest.mark.slow

SETTINGS = dict(max_steps=2, warmup_steps=1, save_interval_steps=2, eval_interval_steps=2)


@pytest.fixture(scope="module")
def finished(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "run"
    train(store, out, **SETTINGS)
    return out


def contents(run: Path) -> dict[str, str]:
    """Path in the run folder -> hash, of all files but the heartbeats, which say when the program ran last."""
    files = [path for path in run.rglob("*") if path.is_file() and path.parent.name != "watchdog"]
    return {str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("named", [False, True], ids=["auto", "by name"])
def test_changed_settings_are_not_recorded(store: Path, finished: Path, tmp_path: Path, named: bool) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    newest, before = run / "iter-00000002-ckpt.pth", contents(run)
    changed = dict(learning_rate=1.0, log_interval_steps=7, tensorboard="true", report="true")
    done = train(store, run, resume=newest if named else "auto", **SETTINGS | changed)
    assert f"nothing to train, nothing was written: {newest} finished at step 2 (max_steps)" in done.stderr
    assert done.stderr.splitlines()[-1].endswith(f"scripts/create.sh {newest}")
    assert " is 1.0 now" not in done.stderr
    assert contents(run) == before


def test_another_run_folder_stays_empty(store: Path, finished: Path, tmp_path: Path) -> None:
    """And it may still become a run, of more steps."""
    other, origin = tmp_path / "other", finished / "iter-00000002-ckpt.pth"
    done = train(store, other, resume=origin, **SETTINGS)
    assert f"nothing to train, nothing was written: {origin} finished at step 2 (max_steps)" in done.stderr
    assert done.stderr.splitlines()[-1].endswith(f"scripts/create.sh {origin}")
    assert contents(other) == {}
    train(store, other, resume=origin, **SETTINGS | {"max_steps": 3})
    assert (other / "iter-00000003-ckpt.pth").is_dir()
