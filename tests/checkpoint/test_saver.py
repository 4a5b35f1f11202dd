"""Saving while training continues: a checkpoint holds the state at the save; full disks, quotas, NaN, kills."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_gpt.checkpoint import checkpoint, full_state, waiting
from lit_gpt.checkpoint.checkpoint import load, verified
from lit_gpt.checkpoint.history import find
from lit_gpt.checkpoint.record import checkpoint_name
from lit_gpt.checkpoint.saver import CheckpointSaver
from lit_gpt.cli import BadInput
from lit_gpt.model.gpt import GPT
from tests.checkpoint.test_checkpoint import facts, model_and_optimizer, save
from tests.support.training import metrics, small_disk, small_quota, train

KINDS = pytest.mark.parametrize("full", [True, False])


def open_saver(run_dir: Path, state: tuple[GPT, torch.optim.Optimizer], **settings: Any) -> CheckpointSaver:
    return CheckpointSaver(run_dir, *state, **{"full": True, "overlap": True, "keep_last": 0, **settings})


def published(run_dir: Path) -> list[str]:
    return sorted(path.name for path in run_dir.iterdir())


class Held:
    """A saver whose thread is busy until `let_go`: a save that takes as long as the test needs."""

    def __init__(self, saver: CheckpointSaver) -> None:
        self.let_go = threading.Event()
        saver._thread.submit(self.let_go.wait, 30)


@KINDS
def test_what_is_written_is_the_moment_of_the_save(tmp_path: Path, full: bool) -> None:
    """Weights and optimizer change before the thread begins to write; twice, as host copies are reused."""
    model, optimizer = model_and_optimizer(seed=5)
    saver = open_saver(tmp_path, (model, optimizer), full=full)
    wanted = {}
    for step in (1, 2):
        held = Held(saver)
        wanted[step] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        moments = [{k: v.clone() for k, v in optimizer.state[p].items()} for p in model.parameters()]
        saver.save(facts(step))
        model(torch.arange(8)[None], None, torch.arange(8)[None]).backward()
        optimizer.step()
        assert published(tmp_path) == [checkpoint_name(s) for s in range(1, step)]
        held.let_go.set()
        saver.wait()
        other, other_optimizer = model_and_optimizer(seed=6)
        load(verified(tmp_path / checkpoint_name(step)), other, other_optimizer)
        assert all(torch.equal(tensor, wanted[step][name]) for name, tensor in other.state_dict().items())
        for parameter, saved in zip(other.parameters(), moments, strict=True):
            assert all(torch.equal(other_optimizer.state[parameter][k], v) for k, v in saved.items())
    saver.close()
    assert not torch.equal(wanted[1]["lm_head.weight"], wanted[2]["lm_head.weight"])


def test_a_second_save_waits_for_the_first_and_so_does_the_end(tmp_path: Path) -> None:
    saver = open_saver(tmp_path, model_and_optimizer(), keep_last=1)
    held = Held(saver)
    saver.save(facts(1))
    second = threading.Thread(target=saver.save, args=(facts(2),))
    second.start()
    second.join(0.3)
    assert second.is_alive()
    assert published(tmp_path) == []
    held.let_go.set()
    second.join()
    held = Held(saver)
    threading.Timer(0.3, held.let_go.set).start()
    saver.save(facts(3), wait=True)
    assert published(tmp_path) == [checkpoint_name(3)]
    held = Held(saver)
    saver.save(facts(4))
    threading.Timer(0.3, held.let_go.set).start()
    saver.close()
    assert published(tmp_path) == [checkpoint_name(4)]


def test_an_error_in_the_background_surfaces_with_its_cause(tmp_path: Path) -> None:
    """The run folder turns into a file."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    saver = open_saver(run_dir, model_and_optimizer())
    held = Held(saver)
    saver.save(facts(1))
    run_dir.rmdir()
    run_dir.write_text("")
    assert not saver.broken
    held.let_go.set()
    while not saver.broken:
        time.sleep(0.01)
    with pytest.raises(RuntimeError, match="could not be written") as raised:
        saver.wait()
    assert isinstance(raised.value.__cause__, OSError)
    saver.close()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused(
    tmp_path: Path, value: float, caplog: pytest.LogCaptureFixture
) -> None:
    """When saved, and when loaded in case they were saved after all. Good checkpoints stay."""
    model, optimizer = model_and_optimizer()
    saver = open_saver(tmp_path, (model, optimizer), keep_last=1)
    saver.save(facts(1), wait=True)
    with torch.no_grad():
        model.transformer.h[0].norm_1.weight[3] = value
    saver.save(facts(2))
    assert saver.failure == "the weights are not finite numbers"
    assert "checkpoint of step 2 was NOT saved: the weights are not finite numbers" in caplog.text
    assert published(tmp_path) == [checkpoint_name(1)]
    saver._weights_are_finite = lambda: True  # type: ignore[method-assign] # a program without this check
    saver.save(facts(3), wait=True)
    saver.close()
    save(tmp_path, facts(2), *model_and_optimizer(seed=2), full=False)
    found = find("auto", tmp_path)
    assert found is not None
    assert found.step == 2
    assert "not finite numbers: transformer.h.0.norm_1.weight" in caplog.text
    with pytest.raises(BadInput, match="not finite numbers"):
        find(str(tmp_path / checkpoint_name(3)), tmp_path)


@KINDS
@pytest.mark.parametrize("overlap", [True, False])
def test_a_full_disk_costs_a_checkpoint_only(
    tmp_path: Path, full: bool, overlap: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Three ways: known beforehand; found while writing, as files have overhead; no inode left."""
    state = model_and_optimizer()
    size = sum(3 * p.numel() * p.element_size() for p in state[0].parameters())
    page = 4096
    with small_disk(tmp_path / "disk", size=1 << 20, inodes=16) as disk:
        run = disk / "run"
        run.mkdir()
        saver = open_saver(run, state, full=full, overlap=overlap)

        def attempt(step: int) -> str | None:
            saver.save(facts(step))
            saver.wait()
            return saver.failure

        assert attempt(1) is None
        free = os.statvfs(disk).f_bavail * page
        (disk / "others").write_bytes(bytes(free - size + page))
        assert "No space left on device" in (attempt(2) or "")
        os.truncate(disk / "others", free - size - page)
        assert "No space left on device" in (attempt(3) or "")
        (disk / "others").unlink()
        files = []
        while os.statvfs(disk).f_ffree > 1:
            files.append(disk / f"other-{len(files)}")
            files[-1].touch()
        assert "No space left on device" in (attempt(4) or "")
        for path in files:
            path.unlink()
        assert published(run) == [checkpoint_name(1)]  # nothing half done is left
        assert caplog.text.count("was NOT saved") == 3
        verified(run / checkpoint_name(1))
        assert attempt(5) is None
        verified(run / checkpoint_name(5))
        saver.close()


@pytest.mark.parametrize(("kind", "overlap"), [("full", "true"), ("sharded", "false")])
def test_a_quota_costs_checkpoints_only(store: Path, tmp_path: Path, kind: str, overlap: str) -> None:
    """The file system has room, the quota has it for one checkpoint and a half: found out while the second is written.

    Training goes on to its end, which says so; a resume with a larger quota would go on from the first.
    """
    with small_quota(tmp_path / "disk", size=18 << 20) as disk:
        done = train(store, disk / "run", expect=74, state_dict_type=kind, async_save=overlap)
        assert done.stderr.count("was NOT saved: [Errno 122] Disk quota exceeded") == 2
        assert done.stderr.count("ended after step 12, without its last checkpoint") == 1
        assert "Traceback" not in done.stderr
        assert [path.name for path in (disk / "run").glob("*iter-*")] == [checkpoint_name(4)]
        verified(disk / "run" / checkpoint_name(4))
        assert len(metrics(disk / "run")) == 12


def test_the_room_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = model_and_optimizer()
    size = sum(3 * p.numel() * p.element_size() for p in state[0].parameters())
    with small_disk(tmp_path / "disk", size=2 * size - size // 2) as disk, caplog.at_level(logging.INFO):
        saver = open_saver(disk, state)
        saver.log_room()
        saver.close()
        saver = open_saver(tmp_path, state)
        saver.log_room()
        saver.close()
    small, large = caplog.records
    assert (small.levelname, large.levelname) == ("WARNING", "INFO")
    assert "room for 1" in small.getMessage()


@pytest.mark.parametrize("overlap", [False, True])
def test_a_save_that_is_waited_for_tells_its_progress(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, overlap: bool
) -> None:
    """Half of the bytes, until that was told; then all, until the hashes were told."""
    model, optimizer = model_and_optimizer()
    size = sum(3 * p.numel() * p.element_size() for p in model.parameters())

    def wait_for(said: str) -> None:
        deadline = time.monotonic() + 30
        while said not in caplog.text:
            assert time.monotonic() < deadline, caplog.text
            time.sleep(0.01)

    def write_halves(state: dict[str, Any], path: Path) -> None:
        path.write_bytes(bytes(10_000_000))
        wait_for(f"{checkpoint_name(7)} is being written, 0.01 of about {size / 1e9:.2f} GB after 0 s")
        write(state, path)

    def seal_slowly(*arguments: Any) -> None:
        wait_for(f"{checkpoint_name(7)} is being synced and hashed, ")
        seal(*arguments)

    write, seal = full_state.write, checkpoint.seal
    monkeypatch.setattr(full_state, "write", write_halves)
    monkeypatch.setattr(checkpoint, "seal", seal_slowly)
    monkeypatch.setattr(waiting, "TELL_S", 0.02)
    saver = open_saver(tmp_path, (model, optimizer), overlap=overlap)
    with caplog.at_level(logging.INFO):
        saver.save(facts(7))
        saver.wait()
    assert published(tmp_path) == [checkpoint_name(7)]
    told = len(caplog.records)
    time.sleep(0.1)
    assert len(caplog.records) == told  # nobody waits any more
    saver.close()


SAVING = """
import os, signal, sys; sys.path[:0] = {paths!r}
from pathlib import Path
from tests.checkpoint.test_checkpoint import facts, model_and_optimizer
from tests.checkpoint.test_saver import open_saver
run_dir, file = Path({run_dir!r}), Path({run_dir!r}) / ".saving-{name}" / {last!r}

def kill(event, arguments):
    if event in ("open", "os.rename") and file.exists():
        os.kill(os.getpid(), signal.SIGKILL)

saver = open_saver(run_dir, model_and_optimizer(), full={full}, keep_last=2)
for step in range(100, 104):
    saver.save(facts(step))
saver.wait()
sys.addaudithook(kill)
saver.save(facts(104), wait=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("full", "last"), [(False, "state/.metadata"), (False, "run.json"), (True, "state.pth"), (True, "MANIFEST.json")]
)
def test_killed_before_the_rename(tmp_path: Path, full: bool, last: str) -> None:
    """SIGKILL at the first operation on files after a file of the save has appeared."""
    name = checkpoint_name(104)
    paths = [str(Path(__file__).parents[2])]
    code = SAVING.format(paths=paths, run_dir=str(tmp_path), full=full, name=name, last=last)
    done = subprocess.run([sys.executable, "-c", code], timeout=240)
    assert done.returncode == -signal.SIGKILL
    assert published(tmp_path) == [f".saving-{name}", *(checkpoint_name(step) for step in (102, 103))]
    assert (tmp_path / f".saving-{name}" / last).exists()
    found = find("auto", tmp_path)
    assert found is not None
    assert found.step == 103
    load(found, *model_and_optimizer())
    save(tmp_path, facts(104), *model_and_optimizer(), full=full)
    assert not list(tmp_path.glob(".saving-*"))
    for path in tmp_path.glob("iter-*"):
        verified(path)
