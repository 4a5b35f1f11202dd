"""Damaged and hostile states, well sealed: the values that torch reads, or one line, in bounded memory, nothing run."""

from __future__ import annotations

import io
import pickle
import random
import resource
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import Metadata

from lit_gpt.checkpoint.checkpoint import load, model_tensors, verified
from lit_gpt.checkpoint.record import DamagedCheckpoint
from lit_gpt.cli import BadInput
from tests.checkpoint.test_checkpoint import facts, model_and_optimizer, published_anew, save
from tests.support.mutations import mutated


@pytest.fixture(params=[True, False], ids=["full", "sharded"])
def path(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    return save(tmp_path, facts(7), *model_and_optimizer(), full=request.param)


def read(path: Path) -> dict[str, torch.Tensor] | str:
    """The weights, or the one line; both ways to read are gone."""
    weights: dict[str, torch.Tensor] | str
    try:
        weights = dict(model_tensors(verified(path)))
        load(verified(path), *model_and_optimizer(seed=3))
    except (BadInput, DamagedCheckpoint) as error:
        weights = str(error)
        assert "\n" not in weights
    return weights


def memory_kib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@pytest.mark.parametrize("seeds", [range(25), pytest.param(range(25, 600), marks=pytest.mark.long)])
@pytest.mark.timeout(600)
def test_right_weights_or_one_line(path: Path, seeds: range) -> None:
    right = read(path)
    assert isinstance(right, dict)
    files = [file for file in sorted(path.rglob("*")) if file.is_file() and file.suffix != ".json"]
    before, taken = memory_kib(), 0
    for seed in seeds:
        choice = random.Random(seed)
        file = choice.choice(files)
        content = file.read_bytes()
        file.write_bytes(mutated(content, choice))
        found = read(published_anew(path))
        whole = file.name == "state.pth" and isinstance(found, dict)
        torchs = torch.load(file, weights_only=True)["model"] if whole else None
        file.write_bytes(content)
        if isinstance(found, dict):
            taken += 1
            assert found.keys() == right.keys()
            assert all(found[name].shape == right[name].shape and found[name].isfinite().all() for name in right), seed
            if torchs is not None:
                assert all(torch.equal(found[name], torchs[name]) for name in right), seed
    assert taken < len(seeds)
    assert memory_kib() - before < 200_000


def resaved(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def act(file: Path) -> None:
        state = torch.load(file, weights_only=True)
        change(state)
        torch.save(state, file)

    return act


def rezipped(change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED) -> Callable[[Path], None]:
    def act(file: Path) -> None:
        with zipfile.ZipFile(file) as whole:
            parts = {name: whole.read(name) for name in whole.namelist()}
        with zipfile.ZipFile(file, "w", compression) as archive:
            for name, content in parts.items():
                archive.writestr(name, change(name, content))

    return act


def pickle_of(content: bytes) -> Callable[[Path], None]:
    return rezipped(lambda name, old: content if name.endswith("data.pkl") else old)


def misplaced(at: int, byte: int) -> Callable[[Path], None]:
    """A byte of the own header of a weight's part, at which the directory does not look."""

    def act(file: Path) -> None:
        with zipfile.ZipFile(file) as archive:
            offset = next(entry.header_offset for entry in archive.infolist() if entry.filename.endswith("/data/26"))
        content = bytearray(file.read_bytes())
        content[offset + at] = byte
        file.write_bytes(content)

    return act


def twin_of_the_pickle(file: Path) -> None:
    """torch finds a part by its name in any case: it may read another pickle than the one that was looked at."""
    with zipfile.ZipFile(file, "a") as archive:
        name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
        archive.writestr(name.upper(), b"\x80\x02}.")


NORM = "transformer.h.0.norm_1.weight"
CALL = b"\x80\x02c%s\n%sR."
HUGE = (1 << 40,)
SPARSE = torch.sparse_coo_tensor(torch.zeros(1, 1, dtype=torch.long), torch.ones(1), HUGE, check_invariants=True)


@pytest.mark.parametrize(
    "act",
    [
        resaved(lambda s: s["model"].update({NORM: torch.ones(1).expand(1 << 40)})),
        resaved(lambda s: s["model"].update({NORM: SPARSE})),
        resaved(lambda s: s["model"].update({NORM: torch.ones(16, dtype=torch.complex64)})),
        resaved(lambda s: s["model"].update({NORM: torch.ones(16, dtype=torch.bool)})),
        resaved(lambda s: s["model"].update({3: torch.ones(1)})),
        resaved(lambda s: s.update(model=[torch.ones(1)])),
        resaved(lambda s: s.update(rng=torch.ones_like(s["rng"]))),
        resaved(lambda s: s.update(more=bytearray(9))),
        rezipped(lambda name, old: old + bytes(1 << 20), zipfile.ZIP_DEFLATED),
        misplaced(0, 0x91),
        misplaced(28, 0),
        misplaced(30, 0x41),
        twin_of_the_pickle,
        pickle_of(CALL % (b"builtins\nbytearray", b"(\x8a\x05" + struct.pack("<q", 1 << 33)[:5] + b"t")),
        pickle_of(b"\x80\x02}" + b")" + b"\x85" * 300_000 + b"Ns."),
        pickle_of(b"\x80\x02}r\xff\xff\xff\x7f."),
        pickle_of(b"\x80\x02}."),
        pickle_of(b""),
    ],
    ids=[
        "expanded", "sparse", "complex", "bool", "number as name", "list", "no generator's state",
        "bytearray", "compressed", "no header", "weights shifted",
        "other name", "twin of the pickle", "giant bytearray", "deep tuple", "giant memo", "empty", "nothing",
    ],
)  # fmt: skip
def test_a_hostile_full_state_is_one_line(tmp_path: Path, act: Callable[[Path], None]) -> None:
    path = save(tmp_path, facts(7), *model_and_optimizer(), full=True)
    before = memory_kib()
    act(path / "state.pth")
    assert isinstance(read(published_anew(path)), str)
    assert memory_kib() - before < 100_000


def reindexed(change: Callable[[Metadata], object]) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        index = pickle.loads((folder / ".metadata").read_bytes())
        change(index)
        (folder / ".metadata").write_bytes(pickle.dumps(index))

    return act


def weight_of(index: Metadata) -> Any:
    return index.state_dict_metadata[f"model.{NORM}"]


def part_of(index: Metadata) -> Any:
    return next(part for where, part in index.storage_data.items() if where.fqn == f"model.{NORM}")


def compressed_part(folder: Path) -> None:
    """A part of 1 MB that unpacks to 1 GB."""
    whole, bomb = io.BytesIO(), io.BytesIO()
    torch.save(torch.ones(16), whole)
    with zipfile.ZipFile(whole) as archive, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in archive.namelist():
            packed.writestr(name, archive.read(name) + bytes(1 << 24 if name.endswith("data/0") else 0))
    (folder / "bomb").write_bytes(bomb.getvalue())
    place = dict(relative_path="bomb", offset=0, length=len(bomb.getvalue()))
    reindexed(lambda index: vars(part_of(index)).update(place))(folder)


@pytest.mark.parametrize(
    "act",
    [
        reindexed(lambda i: vars(weight_of(i)).update(size=torch.Size([1 << 40]))),
        reindexed(lambda i: vars(weight_of(i)).update(size=torch.Size([1 << 40, 1 << 40]))),
        reindexed(lambda i: vars(weight_of(i)).update(size=torch.Size([-1]))),
        reindexed(lambda i: vars(weight_of(i)).update(size="16")),
        reindexed(lambda i: vars(weight_of(i)).update(chunks=None)),
        reindexed(lambda i: vars(weight_of(i).chunks[0]).update(sizes=torch.Size([1 << 40]))),
        reindexed(lambda i: vars(weight_of(i).properties).update(dtype=torch.complex64)),
        reindexed(lambda i: vars(part_of(i)).update(relative_path="../run.json")),
        reindexed(lambda i: vars(part_of(i)).update(relative_path="/dev/zero")),
        reindexed(lambda i: vars(part_of(i)).update(offset=1 << 40)),
        reindexed(lambda i: vars(part_of(i)).update(offset=-5)),
        reindexed(lambda i: vars(part_of(i)).update(length="5")),
        reindexed(lambda i: vars(part_of(i)).update(transform_descriptors=["zstd"])),
        reindexed(lambda i: vars(i).update(state_dict_metadata=[1])),
        reindexed(lambda i: vars(i).update(storage_data=None)),
        lambda folder: (folder / ".metadata").write_bytes(b"\x80\x02]r\xff\xff\xff\x7f."),
        lambda folder: (folder / ".metadata").write_bytes(b"\x80\x04})" + b"\x85" * 300_000 + b"Ns."),
        lambda folder: (folder / ".metadata").write_bytes(b"\x80\x04" + b"]" * (3 << 20) + b"."),
        compressed_part,
    ],
    ids=[
        "giant", "overflow", "negative", "text for a size", "no chunks", "giant chunk", "complex", "file elsewhere",
        "device", "offset beyond", "offset before", "text for a length", "transformed", "list", "no parts",
        "giant memo", "deep tuple", "giant index", "compressed part",
    ],
)  # fmt: skip
def test_a_hostile_sharded_state_is_one_line(tmp_path: Path, act: Callable[[Path], None]) -> None:
    path = save(tmp_path, facts(7), *model_and_optimizer(), full=False)
    before = memory_kib()
    act(path / "state")
    assert isinstance(read(published_anew(path)), str)
    assert memory_kib() - before < 100_000
