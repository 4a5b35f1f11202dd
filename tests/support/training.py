"""Shared by tests of the training program: a small store of learnable data, and the program run as a user runs it."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from lit_gpt.cli import EXIT_NOT_SAVED, EXIT_OK
from lit_gpt.data.token_store import write_store
from tests.support.programs import ROOT, run_program, run_ranks

PROGRAM = ROOT / "pretrain" / "tinyllama_fabric.py"
SMALL = dict(
    model_name="debug", block_size=64, global_batch_size=8, micro_batch_size=4, max_steps=12, learning_rate=3e-3,
    min_lr=3e-4, warmup_steps=3, log_interval_steps=1, save_interval_steps=4, eval_interval_steps=6, accelerator="cpu",
    precision="32-true", tensorboard="false", report="false",
)  # fmt: skip
VOCABULARY = 512
EOS = 2


def documents(count: int, seed: int) -> Iterator[tuple[str, list[int]]]:
    """Random walks in which each token has four successors: 1.4 nats a token once learned, 6.2 before."""
    successors = np.random.default_rng(0).integers(3, VOCABULARY, (VOCABULARY, 4))
    random = np.random.default_rng(seed)
    for number in range(count):
        ids = [int(random.integers(3, VOCABULARY))]
        for _ in range(int(random.integers(2, 200))):
            ids.append(int(successors[ids[-1], random.integers(4)]))
        yield f"doc-{number}", [*ids, EOS]


def make_store(folder: Path) -> Path:
    """Make the stores folder/train and folder/val."""
    for split, count, seed in (("train", 200, 1), ("val", 10, 2)):
        write_store(
            folder / split, documents(count, seed), tokenizer_fingerprint="test", vocab_size=VOCABULARY, bos_id=1,
            eos_id=EOS, shard_tokens=6000,
        )  # fmt: skip
    return folder


def command(store: Path, out_dir: Path, *, program: Path = PROGRAM, **settings: object) -> list[str]:
    values = dict(SMALL, train_data_dir=store / "train", val_data_dir=store / "val", out_dir=out_dir) | settings
    flags = [part for name, value in values.items() if value is not None for part in (f"--{name}", str(value))]
    return [sys.executable, str(program), *flags]


@contextmanager
def small_disk(path: Path, *, size: int, inodes: int = 0) -> Iterator[Path]:
    """A mounted file system of `size` bytes, where the kernel returns ENOSPC; skips where none can be mounted."""
    path.mkdir()
    options = f"size={size}" + (f",nr_inodes={inodes}" if inodes else "")
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here: this test needs root")
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


@contextmanager
def small_quota(path: Path, *, size: int) -> Iterator[Path]:
    """A file system with room and a quota of `size` bytes, where the kernel returns EDQUOT.

    It is btrfs, whose quotas also bind root and are in most kernels; skips where none can be made.
    """
    image, run = path.with_suffix(".img"), path / "quota"
    path.mkdir()
    with image.open("wb") as file:
        file.truncate(256 << 20)
    if shutil.which("mkfs.btrfs") is None:
        pytest.skip("no quota can be made here: this test needs btrfs-progs")
    subprocess.run(["mkfs.btrfs", "-q", str(image)], check=True, capture_output=True)
    if subprocess.run(["mount", "-o", "loop", str(image), str(path)], capture_output=True).returncode:
        pytest.skip("no btrfs can be mounted here: this test needs root")
    try:
        limit = ["btrfs", "qgroup", "limit", str(size), str(run)]
        for command in (["btrfs", "quota", "enable", str(path)], ["btrfs", "subvolume", "create", str(run)], limit):
            subprocess.run(command, check=True, capture_output=True)
        yield run
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


SECRETS = {"WANDB_API_KEY": "0badc0de" * 5, "HF_TOKEN": "hf_" + "Secret42" * 4}
"""Made up, in the shape of real ones."""


def assert_no_secret(folder: Path, *logs: str) -> None:
    """Assert that no key of SECRETS is in a file below the folder, or in a log."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    for name, value in SECRETS.items():
        assert [str(path) for path in files if value.encode() in path.read_bytes()] == [], name
        assert not [log for log in logs if value in log], name


def train(store: Path, out_dir: Path, *, expect: int = 0, **settings: object) -> subprocess.CompletedProcess[str]:
    """Run the training program to its end, and check its exit code.

    Several processes that end in order are started at once, as by torchrun; else the first starts the others.
    """
    flags, ranks = command(store, out_dir, **settings), int(str(settings.get("devices", 1)))
    together = ranks > 1 and expect in (EXIT_OK, EXIT_NOT_SAVED)
    done = run_ranks(flags, ranks) if together else run_program(flags, fresh=ranks > 1)
    assert done.returncode == expect, done.stderr
    return done


DETERMINED = (
    "step",
    "loss",
    "learning_rate",
    "grad_norm",
    "targets",
    "epoch",
    "tokens",
    "val_loss",
    "val_bits_per_byte",
    "skipped_steps",
)


def metrics(out_dir: Path) -> list[dict[str, str]]:
    """The lines of metrics.csv, without columns that depend on the clock."""
    with (out_dir / "metrics.csv").open(newline="") as file:
        return [{name: row[name] for name in DETERMINED} for row in csv.DictReader(file)]


def seen_rows(out_dir: Path) -> dict[int, tuple[int, int, int, str]]:
    """step -> (first slot, rows, targets, digest), from the newest attempt that wrote the step."""
    lines = [json.loads(line) for line in (out_dir / "datapoints" / "steps.jsonl").read_text().splitlines()]
    return {
        line["step"]: (line["slot"], line["rows"], line["targets"], line["digest"]) for line in lines if "slot" in line
    }


def full_state(out_dir: Path, step: int) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint of type full, by name."""
    state = torch.load(out_dir / f"iter-{step:08d}-ckpt.pth" / "state.pth", weights_only=True)
    flat = {f"model.{name}": tensor for name, tensor in state["model"].items()}
    for name, moments in state["optimizer"]["state"].items():
        flat |= {f"optimizer.{name}.{moment}": tensor for moment, tensor in moments.items()}
    return flat | {"rng": state["rng"]}
