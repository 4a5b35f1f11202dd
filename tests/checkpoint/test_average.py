"""The average of a run's checkpoints: the weights that numpy gives, the same bytes from either kind, refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lit_gpt.checkpoint.checkpoint import load, model_tensors, verified
from lit_gpt.checkpoint.history import find, left_behind
from lit_gpt.checkpoint.record import Checkpoint, checkpoint_name
from lit_gpt.cli import BadInput
from lit_gpt.config import Config
from lit_gpt.datapoints.log import FOLDER, DatapointLog
from lit_gpt.model.gpt import GPT, initialize
from scripts import average, convert_lit_checkpoint, evaluate
from tests.checkpoint.test_checkpoint import facts, flip_bit, model_and_optimizer, save
from tests.checkpoint.test_history import go_on
from tests.support.training import metrics

STEPS = (10, 20, 30)


def made_run(folder: Path, *, full: tuple[bool, ...] = (True, True, True)) -> Path:
    """A run that saved steps 10, 20 and 30, each of either kind."""
    folder.mkdir()
    with DatapointLog.open(folder / FOLDER, {"seed": 1}, parent=None, details={"resumed_from": None}) as log:
        for step in range(1, 31):
            log.append(step, 8 * (step - 1), 8, 60, digest=step)
            if step in STEPS:
                place = {"datapoint_log": log.flush_and_fsync()._asdict()}
                save(folder, facts(step) | place, *model_and_optimizer(step), full=full[step // 10 - 1])
    return folder


def averaged(run_dir: Path, *words: str, name: str = "out") -> Checkpoint:
    destination = run_dir / name
    average.main(["--run_dir", str(run_dir), "--destination_path", str(destination), *words])
    return verified(destination)


def arrays(run_dir: Path, step: int) -> dict[str, np.ndarray[Any, Any]]:
    found = model_tensors(verified(run_dir / checkpoint_name(step)))
    return {name: tensor.double().numpy() for name, tensor in found}


@pytest.mark.parametrize(
    ("words", "weights"),
    [
        ([], {10: 1 / 3, 20: 1 / 3, 30: 1 / 3}),
        (["--half_life_steps", "10"], {10: 1 / 7, 20: 2 / 7, 30: 4 / 7}),
        (["--window_steps", "11"], {20: 1 / 2, 30: 1 / 2}),
        (["--to_step", "20", "--half_life_steps", "5"], {10: 1 / 5, 20: 4 / 5}),
    ],
)
def test_is_the_weighted_mean(tmp_path: Path, words: list[str], weights: dict[int, float]) -> None:
    run_dir = made_run(tmp_path / "run", full=(True, False, True))
    found = averaged(run_dir, *words)
    parts = {step: arrays(run_dir, step) for step in weights}
    for name, tensor in model_tensors(found):
        assert tensor.dtype == torch.float32
        wanted = sum(weight * parts[step][name] for step, weight in weights.items())
        np.testing.assert_allclose(tensor.numpy(), wanted, rtol=0, atol=1e-7)
    newest = verified(run_dir / checkpoint_name(max(weights)))
    assert {name: value for name, value in found.facts.items() if name != "average"} == newest.facts
    told = found.facts["average"]["checkpoints"]
    assert {part["step"]: part["weight"] for part in told} == pytest.approx(weights)
    for part in told:
        assert part["state_xxh3"] == verified(run_dir / checkpoint_name(part["step"])).state_xxh3


def test_the_kind_of_a_checkpoint_changes_no_byte(tmp_path: Path) -> None:
    states = []
    for kind, full in (("full", (True,) * 3), ("sharded", (False,) * 3), ("mixed", (True, False, True))):
        found = averaged(made_run(tmp_path / kind, full=full))
        states.append((found.path / "state.pth").read_bytes())
    assert states[0] == states[1] == states[2]


def test_equal_checkpoints_average_to_themselves(tmp_path: Path) -> None:
    for step in (3, 4, 5):
        save(tmp_path, facts(step), *model_and_optimizer(1), full=True)
    before = arrays(tmp_path, 3)
    for name, tensor in model_tensors(averaged(tmp_path, "--half_life_steps", "1")):
        assert np.array_equal(tensor.double().numpy(), before[name])


def test_weights_of_bf16_lose_nothing(tmp_path: Path) -> None:
    """Two neighbours of bf16 have a mean that bf16 has not."""
    for step, value in ((1, 1.0), (2, 1.0078125)):
        model, optimizer = model_and_optimizer()
        with torch.no_grad():
            for weight in model.parameters():
                weight.fill_(value)
        save(tmp_path, facts(step), model.bfloat16(), optimizer, full=True)
    assert all((tensor == 1.00390625).all() for _, tensor in model_tensors(averaged(tmp_path)))


def test_it_is_no_checkpoint_of_the_runs_history(tmp_path: Path) -> None:
    """--resume auto and pruning do not see it; by name, a run can begin with its weights."""
    run_dir = made_run(tmp_path / "run")
    average.main(["--run_dir", str(run_dir)])
    found = find("auto", run_dir)
    assert found is not None
    assert found.path.name == checkpoint_name(30)
    named = find(str(run_dir / "average-00000030"), run_dir)
    assert named is not None
    model, optimizer = model_and_optimizer(9)
    optimizer.state.clear()
    load(named, model, optimizer)
    assert not optimizer.state
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in model_tensors(named))


def test_a_branch_that_was_left_is_not_averaged(tmp_path: Path) -> None:
    go_on(tmp_path, None, 4, 8, 12, until=13)
    go_on(tmp_path, find(str(tmp_path / checkpoint_name(4)), tmp_path), 6, until=7)
    assert [path.name for path in left_behind(tmp_path)] == [checkpoint_name(12), checkpoint_name(8)]
    assert [part["step"] for part in averaged(tmp_path).facts["average"]["checkpoints"]] == [4, 6]


def test_refusals_are_one_line(tmp_path: Path) -> None:
    run_dir = made_run(tmp_path / "run")
    for words, said in (
        (["--window_steps", "10"], "needs two checkpoints or more .* has iter-00000030-ckpt.pth from step 21 to 30"),
        (["--to_step", "25"], "--to_step 25: .* has no checkpoint of that step"),
        (["--half_life_steps", "0"], "--half_life_steps 0.0: must be at least 1"),
    ):
        with pytest.raises(BadInput, match=said):
            averaged(run_dir, *words)
    with pytest.raises(BadInput, match=r"--run_dir .*: no such folder"):
        averaged(tmp_path / "none")
    with pytest.raises(BadInput, match="an average needs two checkpoints"):
        averaged(tmp_path)
    averaged(run_dir)
    with pytest.raises(BadInput, match="out exists already"):
        averaged(run_dir)
    flip_bit(run_dir / checkpoint_name(20) / "state.pth")
    with pytest.raises(BadInput, match=r"iter-00000020-ckpt.pth/state.pth is corrupt: .* choose a window without it"):
        averaged(run_dir, name="other")
    assert not (run_dir / "other").exists()


def test_another_runs_checkpoint_is_refused(tmp_path: Path) -> None:
    """Copied into the run folder: told by the record that it was saved with, and without one by data or tokenizer."""
    run_dir = made_run(tmp_path / "run")
    with DatapointLog.open(tmp_path / FOLDER, {"seed": 2}, parent=None, details={"resumed_from": None}) as log:
        log.append(1, 0, 8, 61, digest=5)
        place = {"datapoint_log": log.flush_and_fsync()._asdict()}
    other = save(tmp_path, facts(25) | place, *model_and_optimizer(1), full=True)
    shutil.copytree(other, run_dir / other.name)
    with pytest.raises(BadInput, match=r"iter-00000025-ckpt.pth is of another run: .*datapoints is not the record"):
        averaged(run_dir)

    plain = tmp_path / "plain"
    plain.mkdir()
    for step, seed in ((1, 1), (2, 1), (3, 2)):
        save(plain, facts(step) | {"slot_facts": {"seed": seed}}, *model_and_optimizer(step), full=True)
    with pytest.raises(BadInput, match=r"iter-00000001-ckpt\.pth is of another run: its data or tokenizer"):
        averaged(plain)
    assert len(averaged(plain, "--to_step", "2").facts["average"]["checkpoints"]) == 2


@pytest.mark.slow
def test_export_and_evaluation_read_it(german_run: Path, tmp_path: Path) -> None:
    """The exported weights are the mean of those of steps 8 and 12; each checkpoint is on the card; it has a loss."""
    words = ["--run_dir", str(german_run), "--window_steps", "5", "--destination_path", str(tmp_path / "average")]
    average.main(words)
    convert_lit_checkpoint.main(
        ["--checkpoint", str(tmp_path / "average"), "--destination_path", str(tmp_path / "hf"), "--dtype", "fp32"]
    )
    before, after = arrays(german_run, 8), arrays(german_run, 12)
    exported = load_file(tmp_path / "hf/model.safetensors")
    for ours, theirs in (("transformer.wte.weight", "model.embed_tokens.weight"), ("lm_head.weight", "lm_head.weight")):
        wanted = (before[ours] + after[ours]) / 2
        np.testing.assert_allclose(exported[theirs].numpy(), wanted, rtol=0, atol=1e-7)
        assert not np.array_equal(before[ours], after[ours])
    states = [verified(german_run / checkpoint_name(step)).state_xxh3 for step in (8, 12)]
    said = f"the average of 2 checkpoints, all alike: step 8 (xxh3 `{states[0]}`), step 12 (xxh3 `{states[1]}`)"
    assert f"| weights | {said} |" in (tmp_path / "hf/README.md").read_text().splitlines()

    output, val = tmp_path / "scores.json", str(german_run.parent / "data/val")
    evaluate.main(
        ["--checkpoint", str(tmp_path / "average"), "--val_data_dir", val, "--dtype", "fp32", "--output", str(output)]
    )
    loss = json.loads(output.read_text())["validation"]["loss"]
    at_6, at_12 = (float(row["val_loss"]) for row in metrics(german_run) if row["val_loss"])
    assert at_12 < loss < at_6


def test_another_shape_is_refused(tmp_path: Path) -> None:
    save(tmp_path, facts(1), *model_and_optimizer(1), full=True)
    wider = GPT(Config.from_name("debug", n_layer=1, n_embd=32, n_head=2, vocab_size=64, block_size=8))
    initialize(wider, 1)
    save(tmp_path, facts(2), wider, torch.optim.AdamW(wider.parameters()), full=True)
    with pytest.raises(BadInput, match=r"is a checkpoint of another model: .*n_embd is 16 there, 32 here"):
        averaged(tmp_path)
