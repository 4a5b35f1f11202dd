"""Damaged checkpoints: they are found, refused or passed over, pruning keeps the whole ones, and no file runs code."""

from __future__ import annotations

import io
import json
import logging
import os
import pickle
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_gpt.bench.bench_checkpoint import PeakMemory
from lit_gpt.checkpoint.checkpoint import load, model_tensors, seal, verified, write_initial
from lit_gpt.checkpoint.history import find, prune
from lit_gpt.checkpoint.record import Checkpoint, DamagedCheckpoint, checkpoint_name, described
from lit_gpt.checkpoint.saver import CheckpointSaver
from lit_gpt.cli import BadInput
from lit_gpt.config import Config
from lit_gpt.model.gpt import GPT, initialize
from tests.support.programs import ROOT, start_program

TINY = Config.from_name("debug", n_layer=1, n_embd=16, n_head=2, intermediate_size=16, vocab_size=64, block_size=8)


def model_and_optimizer(seed: int = 1) -> tuple[GPT, torch.optim.Optimizer]:
    model = GPT(TINY)
    initialize(model, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    model(torch.arange(8)[None], None, torch.arange(8)[None]).backward()
    optimizer.step()
    return model, optimizer


def facts(step: int) -> dict[str, Any]:
    return {"step": step, "slot": 8 * step, "tokens": 60 * step, "settings": {}}


def save(
    run_dir: Path,
    facts: dict[str, Any],
    model: GPT,
    optimizer: torch.optim.Optimizer,
    *,
    full: bool,
    keep_last: int = 0,
) -> Path:
    """Save at once; returns the checkpoint's path."""
    saver = CheckpointSaver(run_dir, model, optimizer, full=full, overlap=False, keep_last=0)
    saver.save(facts)
    saver.close()
    assert saver.failure is None, saver.failure
    return run_dir / checkpoint_name(facts["step"])


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Three checkpoints: steps 10, 20, 30."""
    for step in (10, 20, 30):
        save(tmp_path, facts(step), *model_and_optimizer(step), full=step != 20)
    return tmp_path


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("full", [True, False])
def test_save_and_load(tmp_path: Path, full: bool) -> None:
    model, optimizer = model_and_optimizer(seed=5)
    path = save(tmp_path, facts(7), model, optimizer, full=full)
    assert path == tmp_path / "iter-00000007-ckpt.pth"
    other, other_optimizer = model_and_optimizer(seed=6)
    found = verified(path)
    assert (found.step, found.facts["slot"], found.config) == (7, 56, TINY)
    load(found, other, other_optimizer)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert all(
            torch.equal(optimizer.state[a][k], other_optimizer.state[b][k]) for k in ("exp_avg", "exp_avg_sq", "step")
        )
    streamed = dict(model_tensors(found))
    assert streamed.keys() == model.state_dict().keys()
    assert all(torch.equal(streamed[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("full", [True, False])
def test_the_optimizers_own_options_stay(tmp_path: Path, full: bool) -> None:
    """Each option of the groups differs from the saved one, also one that the saved groups lack, or that only they
    have; the state is the saved one."""
    model, _ = model_and_optimizer(seed=5)
    saved = dict(lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, fused=True, foreach=None, maximize=False)
    own = dict(lr=0.5, betas=(0.5, 0.75), eps=1e-3, weight_decay=100.0, fused=None, foreach=True, maximize=True)
    old = torch.optim.AdamW(model.parameters(), **saved)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    old.step()
    old.param_groups[0]["of_another_version"] = 3
    path = save(tmp_path, facts(7), model, old, full=full)
    other = model_and_optimizer(seed=6)[0]
    other.zero_grad(set_to_none=True)
    new = torch.optim.AdamW(other.parameters(), **own)
    new.param_groups[0]["of_this_version"] = 4
    load(verified(path), other, new)
    group = {name: value for name, value in new.param_groups[0].items() if name != "params"}
    assert {name: group[name] for name in own} == own
    assert group["of_this_version"] == 4
    assert "of_another_version" not in group
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(old.state[a]["exp_avg"], new.state[b]["exp_avg"])
        assert new.state[b]["step"] == 1


def test_names_have_no_wrapper_prefixes(tmp_path: Path) -> None:
    """Compiled blocks save under the same names, and load into plain ones."""
    model, optimizer = model_and_optimizer()
    for block in model.transformer.h:
        block.compile()
    found = verified(save(tmp_path, facts(1), model, optimizer, full=True))
    assert {name for name, _ in model_tensors(found)} == set(GPT(TINY).state_dict())
    load(found, *model_and_optimizer(seed=9))


@pytest.mark.parametrize("damage", ["cut", "bit", "missing", "no manifest", "manifest cut"])
def test_auto_passes_over_a_damaged_checkpoint(run_dir: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    newest = run_dir / checkpoint_name(30)
    state = newest / "state.pth"
    if damage == "cut":
        os.truncate(state, state.stat().st_size - 1)
    elif damage == "bit":
        flip_bit(state)
    elif damage == "missing":
        state.unlink()
    elif damage == "no manifest":
        (newest / "MANIFEST.json").unlink()
    else:
        os.truncate(newest / "MANIFEST.json", 20)
    with caplog.at_level(logging.WARNING):
        found = find("auto", run_dir)
    assert found is not None
    assert found.step == 20
    assert "passing over" in caplog.text
    assert str(state if damage in ("cut", "bit", "missing") else newest) in caplog.text
    with pytest.raises(BadInput, match=r"iter-00000030-ckpt\.pth"):
        find(str(newest), run_dir)


def test_a_flipped_bit_in_a_shard_is_named(run_dir: Path) -> None:
    (data,) = (run_dir / checkpoint_name(20) / "state").glob("*.distcp")
    flip_bit(data)
    with pytest.raises(DamagedCheckpoint, match=rf"{data.name} is corrupt"):
        verified(run_dir / checkpoint_name(20))


def test_nothing_to_resume(tmp_path: Path) -> None:
    assert find("auto", tmp_path) is None
    with pytest.raises(BadInput, match="no such checkpoint"):
        find(str(tmp_path / "iter-00000001-ckpt.pth"), tmp_path)


def test_pruning_keeps_the_good_ones(run_dir: Path) -> None:
    """Three broken and one good with keep_last = 2: the good one survives, and the broken ones are left to look at."""
    save(run_dir, facts(5), *model_and_optimizer(), full=True)
    for step in (10, 20, 30):
        os.truncate(run_dir / checkpoint_name(step) / "run.json", 3)
    (run_dir / ".saving-iter-00000040-ckpt.pth").mkdir()
    prune(run_dir, 30, keep_last=2)
    assert {path.name for path in run_dir.iterdir()} == {checkpoint_name(step) for step in (5, 10, 20, 30)}


def test_pruning_counts_the_newest(run_dir: Path) -> None:
    prune(run_dir, 30, keep_last=0)
    assert len(list(run_dir.glob("iter-*"))) == 3
    prune(run_dir, 30, keep_last=2)
    assert {path.name for path in run_dir.iterdir()} == {checkpoint_name(20), checkpoint_name(30)}


def test_every_nth_stays_and_later_ones_are_another_future(run_dir: Path) -> None:
    save(run_dir, facts(25), *model_and_optimizer(), full=True)
    prune(run_dir, 25, keep_last=1, keep_every_steps=10)  # the run was wound back to 20
    assert {path.name for path in run_dir.iterdir()} == {checkpoint_name(step) for step in (10, 20, 25, 30)}
    prune(run_dir, 30, keep_last=1, keep_every_steps=20)
    assert {path.name for path in run_dir.iterdir()} == {checkpoint_name(step) for step in (20, 30)}


class Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (os.environ["PROOF_OF_EXECUTION"],)


def test_a_pickle_is_not_executed(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint whose state is a malicious pickle, with a manifest that fits it."""
    monkeypatch.setenv("PROOF_OF_EXECUTION", str(tmp_path / "executed"))
    path = run_dir / checkpoint_name(30)
    torch.save({"model": Malicious()}, path / "state.pth")
    (path / "MANIFEST.json").unlink()
    seal(path, run_dir / checkpoint_name(31), facts(31) | {"model": TINY.__dict__})
    with pytest.raises(DamagedCheckpoint, match=r"it was not run: .*[Ww]eights.only"):
        verified(run_dir / checkpoint_name(31))
    assert not (tmp_path / "executed").exists()


def published_anew(path: Path) -> Path:
    """The checkpoint, with a new manifest that matches its changed files."""
    kept = json.loads((path / "run.json").read_text())
    (path / "MANIFEST.json").unlink()
    aside = path.rename(path.with_name("aside"))
    seal(aside, path, kept)
    return path


def test_an_index_is_not_executed(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A malicious index of a sharded checkpoint, which torch would run, is refused; a broken one gives no traceback."""
    monkeypatch.setenv("PROOF_OF_EXECUTION", str(tmp_path / "executed"))
    path = run_dir / checkpoint_name(20)
    for content, told in ((pickle.dumps(Malicious()), r"names posix\.mkdir"), (b"", "pickle exhausted")):
        (path / "state" / ".metadata").write_bytes(content)
        with pytest.raises(DamagedCheckpoint, match=rf"was not run: .*\.metadata: {told}"):
            verified(published_anew(path))
    assert not (tmp_path / "executed").exists()


def malicious_value() -> bytes:
    value = io.BytesIO()
    torch.save(Malicious(), value)
    return value.getvalue()


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (malicious_value, "[Ww]eights.only"),
        (lambda: b"no value at all", "operation without its operands|opcode|pickle"),
        (bytes, "pickle exhausted"),
    ],
    ids=["malicious", "garbage", "empty"],
)
def test_values_of_a_sharded_checkpoint_are_checked(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    value: Callable[[], bytes], told: str,
) -> None:  # fmt: skip
    """A malicious value among the optimizer's settings: refused in one line by name, passed over by auto."""
    monkeypatch.setenv("PROOF_OF_EXECUTION", str(tmp_path / "executed"))
    path = save(run_dir, facts(40), *model_and_optimizer(), full=False)
    index = path / "state" / ".metadata"
    content = pickle.loads(index.read_bytes())
    entry = next(e for name, e in content.storage_data.items() if name.fqn.startswith("optimizer.param_groups"))
    data, written = path / "state" / entry.relative_path, value()
    entry.offset, entry.length = data.stat().st_size, len(written)
    with data.open("ab") as file:
        file.write(written)
    index.write_bytes(pickle.dumps(content))
    published_anew(path)
    with pytest.raises(BadInput, match=rf"{path.name} holds more than .* it was not run: .*({told})") as refused:
        find(str(path), run_dir)
    assert len(str(refused.value).splitlines()) == 1
    assert find("auto", run_dir).step == 30  # type: ignore[union-attr]
    assert f"passing over {path}" in caplog.text
    assert not (tmp_path / "executed").exists()


def test_a_sharded_state_of_another_shape_is_one_line(run_dir: Path) -> None:
    """run.json states a wider model than the tensors have: it is damaged, and loading it all the same is refused."""
    path = run_dir / checkpoint_name(20)
    kept = json.loads((path / "run.json").read_text())
    kept["model"]["intermediate_size"] = 32
    (path / "run.json").write_text(json.dumps(kept))
    with pytest.raises(DamagedCheckpoint, match=r"the 9 weights are not those of the model in run\.json"):
        verified(published_anew(path))
    found = Checkpoint(path, kept)
    wider = GPT(found.config)
    with pytest.raises(BadInput, match=r"not what this run could have saved: .*[Ss]ize mismatch"):
        load(found, wider, torch.optim.AdamW(wider.parameters()))


FIRST = "transformer.h.0.norm_1.weight"


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (lambda s: s["model"].pop(FIRST), f"model lacks {FIRST}$"),
        (lambda s: s["model"].update(x=torch.zeros(1)), "model has an unknown x$"),
        (lambda s: s["model"].update({FIRST: torch.zeros(3)}), rf"model\.{FIRST} is \(3,\), not \(16,\)$"),
        (lambda s: s["optimizer"]["state"].pop(FIRST), rf"optimizer\.state lacks {FIRST}$"),
        (lambda s: s["optimizer"]["state"].update({FIRST: 1}), rf"state\.{FIRST} is a int, not a dictionary$"),
        (lambda s: s["optimizer"]["state"][FIRST].pop("exp_avg"), rf"{FIRST} lacks exp_avg$"),
        (lambda s: s["optimizer"]["param_groups"][0]["params"].pop(), "not of this optimizer's parameters$"),
        (lambda s: s["optimizer"].update(param_groups=None), "not of this optimizer's parameters$"),
        (lambda s: s.update(rng=torch.zeros(4)), r"rng is \(4,\), not"),
        (lambda s: s.pop("rng"), "the state lacks rng$"),
    ],
)
def test_a_full_state_of_other_names_or_shapes_fills_nothing(
    run_dir: Path, edit: Callable[[dict[str, Any]], object], told: str
) -> None:
    path = run_dir / checkpoint_name(10)
    state = torch.load(path / "state.pth", weights_only=True)
    edit(state)
    torch.save(state, path / "state.pth")
    model, optimizer = model_and_optimizer(seed=99)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(BadInput, match=r"not what this run could have saved: .*state\.pth: .*" + told):
        load(described(published_anew(path)), model, optimizer)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_an_imported_model_leaves_the_optimizer_without_a_state(tmp_path: Path) -> None:
    weights = {name: torch.ones_like(tensor) for name, tensor in GPT(TINY).state_dict().items()}
    found = verified(write_initial(tmp_path / checkpoint_name(0), TINY, iter(weights.items()), facts(0)))
    model = GPT(TINY)
    optimizer = torch.optim.AdamW(model.parameters())
    load(found, model, optimizer)
    assert all((tensor == 1).all() for tensor in model.state_dict().values())
    assert not optimizer.state


@pytest.mark.slow
@pytest.mark.parametrize(
    "delay_ms", [0, 3, 7, 11, 17, 23, 31, *(pytest.param(ms / 4, marks=pytest.mark.long) for ms in range(200))]
)
def test_killed_while_saving(tmp_path: Path, delay_ms: float) -> None:
    """SIGKILL during endless saving: the newest published checkpoint is whole, and what is left over is swept."""
    process = start_program([sys.executable, ROOT / "tests/support/endless_saving.py", tmp_path])
    while len(list(tmp_path.glob("iter-*"))) < 3:
        assert process.poll() is None
        time.sleep(0.002)
    time.sleep(delay_ms / 1000)
    process.send_signal(signal.SIGKILL)
    process.wait()
    published = sorted(tmp_path.glob("iter-*"))
    for path in published:
        load(verified(path), *model_and_optimizer())
    prune(tmp_path, 1_000_000, keep_last=1)
    assert list(tmp_path.iterdir()) == published[-1:]


@pytest.mark.slow
def test_an_imported_model_is_written_weight_by_weight(tmp_path: Path) -> None:
    """5 weights of 34 MiB, in fp32 and bf16, read back as they were: memory never holds more than two of them.

    From 32 MiB on the C library gives memory back at once.
    """

    def weights() -> Iterator[tuple[str, torch.Tensor]]:
        for number in range(5):
            dtype, width = (torch.float32, 34 << 8) if number % 2 else (torch.bfloat16, 34 << 9)
            yield f"w.{number}", torch.full((1 << 10, width), float(number), dtype=dtype)

    with PeakMemory(torch.device("cpu")) as memory:
        path = write_initial(tmp_path / checkpoint_name(0), TINY, weights(), facts(0))
    assert memory.peaks["host_extra_gb"] < 0.09
    assert sorted(file.name for file in path.iterdir()) == ["MANIFEST.json", "run.json", "state.pth"]
    read = list(model_tensors(described(path)))
    for (name, got), (wanted_name, wanted) in zip(read, weights(), strict=True):
        assert name == wanted_name
        assert got.dtype == wanted.dtype
        assert torch.equal(got, wanted)


def test_a_checkpoint_larger_than_memory_is_read_weight_by_weight(tmp_path: Path) -> None:
    """A sparse file of 2 TiB, for which Linux refuses a private mapping: its first, small weight is read."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    path = tmp_path / checkpoint_name(1)
    path.mkdir()
    with FakeTensorMode(), torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save({"model": {"small": torch.empty(3, 5), "large": torch.empty(1 << 39)}}, path / "state.pth")
    name, small = next(model_tensors(Checkpoint(path, {})))
    assert (name, small.shape) == ("small", (3, 5))
    assert not small.any()
