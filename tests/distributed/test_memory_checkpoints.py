"""Checkpoints in node memory: two nodes, on one machine, each with a folder of its own, killed between two on disk.

A resume from the memory's, which is newer, is the run that nobody killed. Where it is damaged, or a node's part of it
is missing, the one on disk is taken, which one line tells.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from lit_gpt.checkpoint.checkpoint import model_tensors, verified
from lit_gpt.checkpoint.memory import make_folder
from lit_gpt.checkpoint.record import DamagedCheckpoint
from lit_gpt.cli import BadInput
from lit_gpt.train.settings import Settings
from tests.support.programs import environment, run_program, run_ranks
from tests.support.training import command, metrics, seen_rows
from tests.train.test_step_guard import FAULTY

pytestmark = pytest.mark.distributed
RANKS_OF_A_NODE = {"FULL_SHARD": 1, "HYBRID_SHARD": 2}


class Killed:
    """A run on two nodes that is killed in step 8, when the disk has step 4 and their memory step 6."""

    def __init__(self, store: Path, folder: Path, strategy: str) -> None:
        self.out, self.memory, self._folder, self._store = folder / "out", folder / "memory", folder, store
        self.ranks = 2 * RANKS_OF_A_NODE[strategy]
        self._settings: dict[str, object] = dict(
            devices=self.ranks // 2, num_nodes=2, micro_batch_size=8 // self.ranks, sharding_strategy=strategy,
            save_interval_steps=4, eval_interval_steps=12,
        )  # fmt: skip
        assert self.run(f"8:{self.ranks - 1}:kill").returncode != 0
        for name in ("out", "memory"):
            shutil.copytree(folder / name, folder / f"kept-{name}")

    def run(self, faults: str = "") -> subprocess.CompletedProcess[str]:
        memory = dict(memory_checkpoint_dir=self.memory, memory_checkpoint_steps=2, resume="auto")
        flags = command(self._store, self.out, program=FAULTY, **self._settings, **memory)
        return run_ranks(flags, self.ranks, nodes=2, FAULTS=faults)

    def unbroken(self) -> Path:
        """The same run, not killed, and without the memory."""
        out = self._folder / "unbroken"
        if not out.exists():
            done = run_ranks(command(self._store, out, **self._settings), self.ranks, nodes=2)
            assert done.returncode == 0, done.stderr
        return out

    def restore(self) -> list[Path]:
        """As it was after the kill; returns the checkpoints in memory, by node."""
        for name in ("out", "memory"):
            shutil.rmtree(self._folder / name)
            shutil.copytree(self._folder / f"kept-{name}", self._folder / name)
        return sorted(self.memory.glob("out-*/n[01]/iter-*"))


@pytest.fixture(scope="module", params=["FULL_SHARD", pytest.param("HYBRID_SHARD", marks=[pytest.mark.long])])
def killed(request: pytest.FixtureRequest, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Killed:
    return Killed(store, tmp_path_factory.mktemp("killed"), request.param)


def assert_unbroken(killed: Killed) -> None:
    assert metrics(killed.out) == metrics(killed.unbroken())
    assert seen_rows(killed.out) == seen_rows(killed.unbroken())
    one, two = (
        dict(model_tensors(verified(run / "iter-00000012-ckpt.pth"))) for run in (killed.out, killed.unbroken())
    )
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_killed_run_goes_on_from_memory(killed: Killed) -> None:
    parts = killed.restore()
    assert [path.name for path in parts] == ["iter-00000006-ckpt.pth"] * 2
    for part in parts:
        verified(part, part=True)
        if killed.ranks == 2:  # half of the state, which nothing takes for the whole
            with pytest.raises(DamagedCheckpoint, match=r"\d+ of the \d+ numbers of .* are in the files"):
                verified(part)
    done = killed.run()
    assert done.returncode == 0, done.stderr
    assert re.findall(r"resumed from (.*): step", done.stderr) == [str(parts[0])]
    assert_unbroken(killed)
    assert list(killed.memory.rglob("*")) == [], "nothing stays in memory after the end"


@pytest.mark.parametrize(("fault", "told"), [("a bit", "__0_0.distcp is corrupt: xxh3 "), ("a node", "none in ")])
def test_where_memory_is_not_whole_the_disk_is_taken(killed: Killed, fault: str, told: str) -> None:
    part, rank = killed.restore()[1], killed.ranks // 2
    if fault == "a bit":
        path = part / "state" / "__0_0.distcp"
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 4
        path.write_bytes(content)
    else:
        shutil.rmtree(part.parent)
    done = killed.run()
    assert done.returncode == 0, done.stderr
    (line,) = (line for line in done.stderr.splitlines() if "node memory" in line)
    assert f"WARNING the checkpoints in node memory are not used: rank {rank}: " in line
    assert told in line
    assert re.findall(r"resumed from (.*): step", done.stderr) == [str(killed.out / "iter-00000004-ckpt.pth")]
    assert_unbroken(killed)


@pytest.mark.parametrize("nodes", [1, pytest.param(2, marks=pytest.mark.long)])
def test_fewer_ranks_go_on_from_memory_on_one_node(store: Path, tmp_path: Path, nodes: int) -> None:
    """As after a lost GPU. After a lost node the single rank finds half of the state, and says so."""
    out, memory = tmp_path / "run", tmp_path / "memory"
    settings = dict(
        memory_checkpoint_dir=memory, memory_checkpoint_steps=2, resume="auto", save_interval_steps=4, max_steps=7,
        micro_batch_size=4, eval_interval_steps=12,
    )  # fmt: skip
    two = command(store, out, program=FAULTY, **settings, num_nodes=nodes, devices=2 // nodes)
    assert run_ranks(two, 2, nodes=nodes, FAULTS="7:1:kill").returncode != 0
    if nodes == 1:
        (folder,) = memory.glob("run-*/*")
        folder.rename(folder.with_name("n0"))
    done = run_program(command(store, out, **settings), env=environment(SLURMD_NODENAME="n0"))
    assert done.returncode == 0, done.stderr
    (resumed,) = re.findall(r"resumed from (.*): step", done.stderr)
    assert Path(resumed).is_relative_to(memory if nodes == 1 else out)
    assert done.stderr.count("the ranks are on other nodes now") == nodes - 1


def test_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for inside in (run, run / "memory", tmp_path / "run" / ".." / "run"):
        with pytest.raises(BadInput, match="is inside the run folder"):
            make_folder(str(inside), run, "n0", 1)
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(BadInput, match=r"GB are free there, and a node's part of two checkpoints takes .* GB\."):
        make_folder(str(tmp_path), run, "n0", free)
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(BadInput, match=r"it cannot be written \(File exists\)|\(Not a directory\)"):
        make_folder(str(file), run, "n0", 1)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(BadInput, match="is another user's"):
        make_folder(str(tmp_path), run, "n0", 1)
    for given, words in (
        (dict(memory_checkpoint_dir="/dev/shm"), "give both, or neither"),
        (dict(memory_checkpoint_steps=5), "give both, or neither"),
        (dict(memory_checkpoint_dir="/dev/shm", memory_checkpoint_steps=10_000), "must be below --save_interval_steps"),
    ):
        with pytest.raises(BadInput, match=words):
            Settings(train_data_dir="x", **given).check()  # type: ignore[arg-type]


def test_two_runs_and_two_nodes_have_folders_of_their_own(tmp_path: Path) -> None:
    places = [(tmp_path / "a" / "run", "n0"), (tmp_path / "a" / "run", "n1"), (tmp_path / "b" / "run", "n0")]
    folders = [make_folder(str(tmp_path / "memory"), run, node, 1) for run, node in places]
    assert len(set(folders)) == 3
    assert all(folder.parent.stat().st_mode & 0o777 == 0o700 for folder in folders)
    (folders[0] / "old").write_bytes(bytes(100))
    assert make_folder(str(tmp_path / "memory"), *places[0], 1) == folders[0]
