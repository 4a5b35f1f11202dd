"""MANIFEST.json and run.json of a checkpoint with any bit flipped, and well sealed ones that say something else."""

from __future__ import annotations

import json
import logging
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_gpt.checkpoint.checkpoint import is_whole, seal, verified
from lit_gpt.checkpoint.history import find, left_behind, prune
from lit_gpt.checkpoint.record import DamagedCheckpoint, checkpoint_name, described
from lit_gpt.cli import BadInput
from lit_gpt.datapoints.log import FOLDER, DatapointLog
from tests.checkpoint.test_checkpoint import facts, model_and_optimizer, save

TWO = [checkpoint_name(step) for step in (10, 20)]


@pytest.fixture(params=[True, False], ids=["full", "sharded"])
def run_dir(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """Steps 10 and 20 of one branch, saved by one run."""
    with DatapointLog.open(tmp_path / FOLDER, {"seed": 1}) as log:
        for step in (10, 20):
            log.append(step, 8 * step, 8, 60, digest=step)
            more = {"datapoint_log": log.flush_and_fsync()._asdict(), "left_out": [(8, 16)], "val_data_dir": None}
            save(tmp_path, facts(step) | more, *model_and_optimizer(step), full=request.param)
    return tmp_path


def flipped(content: bytes, bits: Iterator[int] | range) -> Iterator[bytes]:
    for bit in bits:
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        yield bytes(changed)


@pytest.mark.parametrize("name", ["MANIFEST.json", "run.json"])
@pytest.mark.parametrize("every", [61, pytest.param(1, marks=pytest.mark.long)])
def test_a_flipped_bit_is_never_taken(run_dir: Path, name: str, every: int, caplog: pytest.LogCaptureFixture) -> None:
    """The newest one has it: refused by name, passed over by auto; pruning and the branches meet it and go on."""
    newest = run_dir / TWO[1]
    whole = (newest / name).read_bytes()
    hidden = 0
    for changed in flipped(whole, range(0, 8 * len(whole), every)):
        (newest / name).write_bytes(changed)
        caplog.clear()
        with pytest.raises(DamagedCheckpoint):
            verified(newest)
        found = find("auto", run_dir)
        assert found is not None
        assert found.step == 10
        assert "passing over" in caplog.text
        hidden += is_whole(newest)
        assert left_behind(run_dir) == []
        prune(run_dir, 20, keep_last=2)
        assert sorted(path.name for path in run_dir.glob("iter-*")) == TWO
    if name == "run.json":
        assert hidden == 0
    else:  # only what verifying finds: another hash of the state
        assert hidden * every < 0.6 * 8 * len(whole)
    (newest / name).write_bytes(whole)
    assert find("auto", run_dir).step == 20  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["MANIFEST.json", "run.json"])
def test_pruning_during_a_training_keeps_the_good_one(run_dir: Path, name: str) -> None:
    """Cut, empty, of NUL bytes, no UTF-8, deep, huge numbers, wrong kinds: none counts, none ends the run."""
    path = run_dir / TWO[1] / name
    whole = path.read_bytes()
    contents = [
        b"", whole[:-3], bytes(len(whole)), whole[:40] + bytes(60), b"\xff\xfe" + whole, b"[" * 100_000, b"{}", b"[]",
        b"7", b'"x"', b"null", b'{"run.json": 5}', b'{"step": 20}', whole.replace(b'"', b"'"), b"9" * 5000,
    ]  # fmt: skip
    for content in contents:
        path.write_bytes(content)
        assert not is_whole(path.parent)
        prune(run_dir, 20, keep_last=1)
        assert sorted(folder.name for folder in run_dir.glob("iter-*")) == TWO, content[:20]
        assert find("auto", run_dir).step == 10  # type: ignore[union-attr]
        with pytest.raises(BadInput, match=TWO[1]) as refused:
            find(str(path.parent), run_dir)
        assert len(str(refused.value).splitlines()) == 1


def sealed(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """The checkpoint again, with changed facts and a manifest that fits them."""
    content = json.loads((path / "run.json").read_text())
    change(content)
    (path / "MANIFEST.json").unlink()
    seal(path.rename(path.with_name("aside")), path, content)


LIES: dict[str, Callable[[dict[str, Any]], object]] = {
    "a step that is text": lambda f: f.update(step="20"),
    "a step that is true": lambda f: f.update(step=True),
    "a step with a fraction": lambda f: f.update(step=20.5),
    "another step than the name": lambda f: f.update(step=21),
    "no slot": lambda f: f.pop("slot"),
    "a slot below 0": lambda f: f.update(slot=-8),
    "no settings": lambda f: f.update(settings=None),
    "a mark that lacks its hash": lambda f: f["datapoint_log"].pop("xxh3"),
    "a mark of text": lambda f: f.update(datapoint_log="0:20"),
    "ranges that are numbers": lambda f: f.update(left_out=[8, 16]),
    "a guard without norms": lambda f: f.update(step_guard={"skipped": 0, "in_a_row": 0}),
    "no model": lambda f: f.pop("model"),
    "a model without a width": lambda f: f["model"].pop("n_embd"),
    "a model of text": lambda f: f["model"].update(n_layer="1"),
    "a model that cannot be": lambda f: f["model"].update(n_head=3),
    "a model of more layers": lambda f: f["model"].update(n_layer=2**60),
    "a wider model": lambda f: f["model"].update(intermediate_size=32),
    "a model with an unknown field": lambda f: f["model"].update(rope_scaling=2.0),
}


@pytest.mark.parametrize("lie", LIES)
def test_well_sealed_but_not_a_checkpoint(run_dir: Path, lie: str) -> None:
    newest = run_dir / TWO[1]
    sealed(newest, LIES[lie])
    with pytest.raises(DamagedCheckpoint, match=TWO[1]) as refused:
        verified(newest)
    assert len(str(refused.value).splitlines()) == 1
    assert find("auto", run_dir).step == 10  # type: ignore[union-attr]
    assert left_behind(run_dir) == []
    prune(run_dir, 20, keep_last=1 if not is_whole(newest) else 2)
    assert (run_dir / TWO[0]).exists()


def state_is_gone(path: Path) -> None:
    for name in ("state.pth", "state"):
        shutil.rmtree(path / name) if (path / name).is_dir() else (path / name).unlink(missing_ok=True)


def index_without_entries(path: Path) -> None:
    state_is_gone(path)
    (path / "state").mkdir()
    from torch.distributed.checkpoint.metadata import Metadata

    (path / "state" / ".metadata").write_bytes(pickle.dumps(Metadata(state_dict_metadata={}, storage_data={})))


def state_without_weights(path: Path) -> None:
    state_is_gone(path)
    torch.save({"model": {}, "optimizer": {}, "rng": torch.zeros(8)}, path / "state.pth")


@pytest.mark.parametrize("change", [state_is_gone, index_without_entries, state_without_weights])
def test_well_sealed_without_a_state(run_dir: Path, change: Callable[[Path], None]) -> None:
    newest = run_dir / TWO[1]
    change(newest)
    sealed(newest, lambda _: None)
    with pytest.raises(DamagedCheckpoint, match=TWO[1]):
        verified(newest)
    assert find("auto", run_dir).step == 10  # type: ignore[union-attr]


def manifest_of(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((path / "MANIFEST.json").read_text())
    change(content)
    (path / "MANIFEST.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.clear(),
        lambda m: m.pop("run.json"),
        lambda m: [m.pop(name) for name in list(m) if name.startswith("state")],
        lambda m: m.update({"../secret": {"bytes": 6, "xxh3": "0" * 16}}),
        lambda m: m.update({"/etc/hostname": {"bytes": 6, "xxh3": "0" * 16}}),
        lambda m: m.update({"a\0b": {"bytes": 6, "xxh3": "0" * 16}, "\ud800": {"bytes": 6, "xxh3": "0" * 16}}),
        lambda m: m["run.json"].update(bytes="7"),
        lambda m: m["run.json"].update(xxh3=None),
        lambda m: m.update({"run.json": [1, 2]}),
        lambda m: m.update({"state/.metadata": m["run.json"], "state.pth": m["run.json"]}),
    ],
)
def test_a_manifest_of_another_kind(run_dir: Path, change: Callable[[dict[str, Any]], object]) -> None:
    (run_dir / "secret").write_text("secret")
    manifest_of(run_dir / TWO[1], change)
    assert not is_whole(run_dir / TWO[1])
    assert find("auto", run_dir).step == 10  # type: ignore[union-attr]


def test_a_state_that_the_manifest_lacks_is_not_read(run_dir: Path) -> None:
    """Whether one of several shards, or a whole state beside the saved one."""
    newest = run_dir / TWO[1]
    planted = newest / ("state.pth" if (newest / "state").exists() else "state/__0_0.distcp")
    planted.parent.mkdir(exist_ok=True)
    planted.write_bytes(b"not saved")
    with pytest.raises(DamagedCheckpoint, match=r"is not in MANIFEST\.json"):
        described(newest)
    planted.rename(planted.with_name(".nfs0001" if planted.parent != newest else "notes.txt"))
    assert verified(newest).step == 20


def test_what_only_has_the_name(run_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A file, a link to nothing, a link in a circle, an empty folder, a folder in the manifest's place."""
    names = [run_dir / checkpoint_name(step) for step in (30, 31, 32, 33, 34)]
    names[0].write_text("iter")
    names[1].symlink_to(run_dir / "nothing")
    names[2].symlink_to(names[2])
    names[3].mkdir()
    (names[4] / "MANIFEST.json").mkdir(parents=True)
    with caplog.at_level(logging.WARNING):
        assert find("auto", run_dir).step == 20  # type: ignore[union-attr]
    assert caplog.text.count("passing over") == 5
    prune(run_dir, 40, keep_last=1)
    assert sorted(path.name for path in run_dir.glob("iter-*")) == [TWO[1], *(path.name for path in names)]
    for path in names:
        with pytest.raises(BadInput):
            find(str(path), run_dir)


def test_a_disk_that_cannot_read(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """EIO for the newest state: passed over."""
    import lit_gpt.checkpoint.record as record

    whole = record.xxh3

    def xxh3(path: Path) -> str:
        if TWO[1] in str(path) and path.name != "run.json":
            raise OSError(5, os.strerror(5))
        return whole(path)

    monkeypatch.setattr(record, "xxh3", xxh3)
    assert find("auto", run_dir).step == 10  # type: ignore[union-attr]
