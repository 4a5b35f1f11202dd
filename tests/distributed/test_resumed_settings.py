"""Each setting changed at a resume, on two processes: what took effect is what the records say, or one line refuses.

The records: settings.yaml, resolved.json, the checkpoint's run.json, the attempt in datapoints/run.json, and the log.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from lit_gpt.config import Config
from lit_gpt.data.loader import PackedDataset
from lit_gpt.data.token_store import TokenStore, write_store
from lit_gpt.data.tokenizer import Tokenizer
from lit_gpt.datapoints.attempts import read_attempts
from lit_gpt.datapoints.run_folder import read_metrics
from lit_gpt.model.gpt import GPT
from lit_gpt.train.resolve import CHOICES
from lit_gpt.train.settings import OptimizerSettings, Settings
from tests.support.programs import ROOT, environment
from tests.support.resumed_settings import BASE, CASES, FURTHER, Case, Seen, filled
from tests.support.small_tokenizer import write_byte_level
from tests.support.training import full_state

pytestmark = pytest.mark.distributed

OPTIMIZER = [field.name for field in fields(OptimizerSettings)]
OF_ONE_START = ("resume", "allow_changed_data", "new_data")
FEW = ["unchanged", "schedule", "optimizer", "sharding_strategy", "precision", "micro_batch_size",
       "val_data_dir", "wandb_project", "seed"]  # fmt: skip
"""Those that `make test` runs."""


def make_stores(root: Path) -> None:
    """Documents of 70 tokens: 16 steps of 8 rows, or 3 and 6 batches of 8 rows to validate."""
    fingerprint = Tokenizer.from_folder(write_byte_level(root / "tokenizer", [])).fingerprint
    shutil.copytree(root / "tokenizer", root / "copied")
    for name, count, seed in (("train", 120, 1), ("val", 20, 2), ("other", 40, 3)):
        ids = np.random.default_rng(seed).integers(3, 250, (count, 69)).tolist()
        write_store(
            root / name, [(f"{name}-{n}", [*row, 1]) for n, row in enumerate(ids)], tokenizer_fingerprint=fingerprint,
            vocab_size=300, bos_id=None, eos_id=1, shard_tokens=3000,
        )  # fmt: skip


def walk(root: Path, names: Sequence[str]) -> None:
    """Two ranks go through these trainings; each has a port of its own."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in names]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        ports = json.dumps([one.getsockname()[1] for one in sockets])
    command = [sys.executable, "-m", "tests.support.settings_walk", str(root), ports, *names]
    place = dict(TORCHELASTIC_RUN_ID="walk", WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    ranks = []
    for rank in ("0", "1"):
        variables = environment(**place, RANK=rank, LOCAL_RANK=rank, GROUP_RANK="0", PYTHONPATH=str(ROOT))
        with (root / f"stderr.{rank}").open("w") as errors:
            ranks.append(subprocess.Popen(command, env=variables, stderr=errors, cwd=ROOT))
    try:
        codes = [process.wait(timeout=1500) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert codes == [0, 0], "".join((root / f"stderr.{rank}").read_text() for rank in (0, 1))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the walk, with the base run, and its checkpoint of step 4 beside it."""
    root = tmp_path_factory.mktemp("walk")
    make_stores(root)
    return root


def run_cases(root: Path, names: list[str]) -> None:
    walk(root, ["base", *names])
    for name in names:
        check(root, name, FURTHER.get(name) or CASES[name])


def outcome(root: Path, name: str, rank: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((root / f"{name}.{rank}.json").read_text())
    return found


def check(root: Path, name: str, case: Case) -> None:
    ranks = [outcome(root, name, rank) for rank in (0, 1)]
    run = root / name.replace(" ", "_") / "run"
    outcomes = [found["outcome"] for found in ranks]
    if case.refused is not None:
        assert re.search(f"refused: .*{case.refused}", outcomes[0]), (name, outcomes)
        assert "\n" not in outcomes[0]
        assert outcomes[1] in (outcomes[0], "ended: 2"), (name, outcomes)
        assert len(read_attempts(run / "datapoints")) == 1, name
        return
    assert outcomes == [0, 0], (name, outcomes, ranks[0]["log"])
    asked = filled(BASE | {"out_dir": str(run)} | case.change, root)
    settings = asdict(Settings(**asked))
    run = Path(settings["out_dir"])
    rows = [row for row in read_metrics(run / "metrics.csv") if int(row["step"]) > 4]
    if case.seen is not None:
        seen = Seen([found["probe"] for found in ranks], rows, ranks[0]["log"], run)
        assert case.seen(seen) == json.loads(json.dumps(case.now).replace("ROOT", str(root))), name
    check_records(name, run, settings, {n: v for n, v in settings.items() if n in case.change}, ranks, root)


def check_records(
    name: str, run: Path, settings: dict[str, Any], changed: dict[str, Any], ranks: list[dict[str, Any]], root: Path
) -> None:
    """Every record says the settings that ran, and what has changed since the checkpoint."""
    kept = {setting: value for setting, value in settings.items() if setting not in OF_ONE_START}
    assert yaml.safe_load((run / "settings.yaml").read_text()) == kept, name
    newest = max(run.glob("iter-*"))
    facts = json.loads((newest / "run.json").read_text())
    assert {setting: facts["settings"][setting] for setting in kept} == kept, name
    before = asdict(Settings(**filled(BASE | {"out_dir": str(root / "base/run")}, root)))
    expected = {setting: [before[setting], value] for setting, value in (changed | {"out_dir": str(run)}).items()}
    details = read_attempts(run / "datapoints")[-1].details
    assert details["changed_settings"] == expected, name
    told = [line for line in ranks[0]["log"] if " when the checkpoint was saved, and is " in line]
    assert told == [
        f"--{setting} was {was!r} when the checkpoint was saved, and is {now!r} now"
        for setting, (was, now) in expected.items()
    ] or sorted(told) == sorted(
        f"--{setting} was {was!r} when the checkpoint was saved, and is {now!r} now"
        for setting, (was, now) in expected.items()
    ), name
    resolved = json.loads((run / "resolved.json").read_text())
    assert resolved == facts["resolved"], name
    assert {choice: resolved[choice] for choice in changed if choice in CHOICES and changed[choice] != "auto"} == {
        choice: value for choice, value in changed.items() if choice in CHOICES and value != "auto"
    }, name
    assert resolved["max_steps"] == int(newest.name[5:13]), name


def rate(step: int, s: Settings, last: int) -> float:
    """The learning rate of update `step`, from 1."""
    done = step - 1
    if done < s.warmup_steps:
        return s.learning_rate * step / s.warmup_steps
    if s.lr_schedule == "constant":
        return s.learning_rate
    if s.lr_schedule == "wsd":
        return s.learning_rate - (s.learning_rate - s.min_lr) * max(0, step - (last - s.decay_steps)) / s.decay_steps
    angle = math.pi * (done - s.warmup_steps) / (last - 1 - s.warmup_steps)
    return s.min_lr + (s.learning_rate - s.min_lr) * (1 + math.cos(angle)) / 2


def by_pytorch(root: Path, settings: Settings, last: int, end: int) -> dict[str, torch.Tensor]:
    """The weights after step `last`, from the state of step 4, by PyTorch's AdamW and clipping on one process.

    end: the schedule's last step.
    """
    state = torch.load(root / "step-4" / "state.pth", weights_only=True)
    model = GPT(Config.from_name("debug", block_size=64, vocab_size=300))
    model.load_state_dict(state["model"])
    data = PackedDataset(TokenStore.open(root / "train"), 64, 3407)
    named = dict(model.named_parameters())
    groups = [
        {"params": [p for p in named.values() if p.dim() == 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in named.values() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(settings.beta1, settings.beta2), eps=1e-8, lr=1.0)
    for name, moments in state["optimizer"]["state"].items():
        optimizer.state[named[name]] = {key: value.clone() for key, value in moments.items()}
    for step in range(5, last + 1):
        batch, _ = data.read(np.arange(8 * (step - 1), 8 * step))
        targets = batch.targets.long()
        loss = model(batch.tokens.long(), batch.cu_seqlens, targets) / (targets >= 0).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = rate(step, settings, end)
        optimizer.step()
        optimizer.zero_grad()
    data.close()
    return {f"model.{name}": value.detach() for name, value in named.items()}


def check_weights(root: Path, names: list[str]) -> None:
    """The settings of the optimizer, by the weights that they make: PyTorch's, and others than with any of them left
    as it was."""
    for name in names:
        case = FURTHER.get(name) or CASES[name]
        change = case.change
        if case.refused or not set(change) <= set(OPTIMIZER):
            continue
        last = 7 if name in ("max_steps", "max_tokens") else 8
        got = full_state(root / name / "run", last)
        far = distance(got, by_pytorch(root, Settings(**filled(BASE | change, root)), last, last))
        assert far < 1e-4, name
        for left in change:
            if left not in ("lr_schedule", "decay_steps"):  # which go together
                others = {setting: value for setting, value in change.items() if setting != left}
                far = distance(got, by_pytorch(root, Settings(**filled(BASE | others, root)), last, 8))
                assert far > 1e-3, (name, left)


def distance(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """The largest difference of a weight, relative to its norm."""
    return max(float((got[name] - value).norm() / value.norm()) for name, value in wanted.items())


def test_settings_that_matter_most(root: Path) -> None:
    run_cases(root, FEW)
    check_weights(root, FEW)
    log = outcome(root, "val_data_dir", 0)["log"]
    assert "validation data other than the checkpoint's: val_loss from here on is of other texts" in log
    for name, case in CASES.items():  # what would be seen without the change
        if case.seen is not None:
            unchanged = [outcome(root, "unchanged", rank) for rank in (0, 1)]
            run = root / "unchanged" / "run"
            rows = [row for row in read_metrics(run / "metrics.csv") if int(row["step"]) > 4]
            was = case.seen(Seen([found["probe"] for found in unchanged], rows, unchanged[0]["log"], run))
            assert was == case.was, name


@pytest.mark.long
def test_every_setting(root: Path) -> None:
    names = [name for name in {**FURTHER, **CASES} if name not in FEW and (FURTHER.get(name) or CASES[name]).change]
    run_cases(root, names)
    check_weights(root, names)
