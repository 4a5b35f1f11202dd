"""A user's mistakes: each gives one line that names what is wrong, exit code 2 and no traceback."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lit_gpt.data.token_store import write_store
from tests.support.programs import ROOT, environment, run_program
from tests.support.training import VOCABULARY, command, train


@pytest.fixture(scope="module")
def finished(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a finished run of two steps."""
    out = tmp_path_factory.mktemp("finished")
    train(store, out, max_steps=2, warmup_steps=1, save_interval_steps=2, eval_interval_steps=2)
    return out


def assert_refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if " INFO " not in line and " WARNING " not in line]
    assert len(errors) == 1, done.stderr
    assert "error: " in errors[0]
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in errors[0], f"{word!r} is not in: {errors[0]}"


def flip_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def copied(store: Path, to: Path, damage: Callable[[Path], Any]) -> Path:
    shutil.copytree(store, to)
    damage(to / "train")
    return to / "train"


def one_token_documents(folder: Path, *, and_a_longer: bool = False) -> Path:
    """Documents of the EOS alone; with and_a_longer, a second shard of many rows with one document of two tokens."""
    documents = [(str(number), [2]) for number in range(40)]
    if and_a_longer:
        documents += [(f"more {number}", [2]) for number in range(20_000)] + [("longer", [7, 2])]
    write_store(
        folder, documents, tokenizer_fingerprint="test", vocab_size=VOCABULARY, bos_id=1, eos_id=2, shard_tokens=1 << 20
    )  # fmt: skip
    return folder


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


TRAINING: dict[str, tuple[Callable[[Path, Path], dict[str, object]], list[str]]] = {
    "no data named": (lambda store, tmp: {"train_data_dir": None}, ["--train_data_dir", "prepare_data.py"]),
    "folder missing": (lambda store, tmp: {"train_data_dir": tmp / "nowhere"}, ["nowhere"]),
    "folder empty": (lambda store, tmp: {"train_data_dir": tmp}, ["MANIFEST.json"]),
    "manifest damaged": (
        lambda store, tmp: {"train_data_dir": copied(store, tmp / "x", lambda d: truncate(d / "MANIFEST.json"))},
        ["MANIFEST.json"],
    ),
    "unknown model": (lambda store, tmp: {"model_name": "LLaMmlein_2B"}, ["LLaMmlein_2B", "LLaMmlein_1B", "debug"]),
    "model of another vocabulary": (
        lambda store, tmp: {"model_name": "LLaMmlein_120M", "block_size": None},
        ["512", "32010", "--vocab_size"],
    ),
    "batch that does not divide": (
        lambda store, tmp: {"global_batch_size": 10, "micro_batch_size": 4},
        ["global_batch_size=10", "Valid: ", "micro_batch_size 1, 2, 5, 10"],
    ),
    "batch larger than the data": (
        lambda store, tmp: {"global_batch_size": 4096, "micro_batch_size": 8},
        ["too few", "4096"],
    ),
    "no rows": (lambda store, tmp: {"global_batch_size": 0}, ["--global_batch_size 0", "at least 1"]),
    "rising schedule": (lambda store, tmp: {"min_lr": 1.0}, ["--min_lr 1.0", "--learning_rate 0.003", "rise"]),
    "warm-up longer than the run": (lambda store, tmp: {"warmup_steps": 50}, ["--warmup_steps 50", "--max_steps 12"]),
    "wsd without decay": (lambda store, tmp: {"lr_schedule": "wsd"}, ["--decay_steps 0", "wsd"]),
    "no such setting": (lambda store, tmp: {"learning_rte": 1}, ["learning_rte"]),
    "value of another type": (lambda store, tmp: {"max_steps": "many"}, ["max_steps", "many"]),
    "value outside the choices": (lambda store, tmp: {"precision": "fp4"}, ["precision", "fp4", "bf16-mixed"]),
    "group without hybrid": (lambda store, tmp: {"shard_group_size": 2}, ["--shard_group_size 2", "HYBRID_SHARD"]),
    "group that does not divide": (
        lambda store, tmp: {
            "devices": 4,
            "micro_batch_size": 2,
            "sharding_strategy": "HYBRID_SHARD",
            "shard_group_size": 3,
        },
        ["--shard_group_size 3", "4 processes", "Valid: 1, 2, 4"],
    ),
    "a rollback of no step": (lambda store, tmp: {"rollback_steps": 0}, ["--rollback_steps 0", "at least 1"]),
    "spike below the usual": (lambda store, tmp: {"spike_factor": 1.0}, ["--spike_factor 1.0", "above 1"]),
    "plan without memory": (lambda store, tmp: {"plan_gpu_gib": 0, "plan": "true"}, ["--plan_gpu_gib"]),
    "plan of a batch that does not divide": (
        lambda store, tmp: {"devices": 3, "plan": "true"},
        ["global_batch_size=8", "3 processes"],
    ),
    "unknown attention": (lambda store, tmp: {"attention": "fa3"}, ["--attention fa3", "CUDA"]),
    "no GPU": (lambda store, tmp: {"accelerator": "cuda"}, ["--accelerator cuda", "cpu"]),
    "config missing": (lambda store, tmp: {"config": tmp / "no.yaml"}, ["no.yaml"]),
    "checkpoint missing": (
        lambda store, tmp: {"resume": tmp / "iter-00000001-ckpt.pth"},
        ["--resume", "no checkpoint"],
    ),
    "cache in a data set": (lambda store, tmp: {"cache_dir": store}, ["--cache_dir", "train holds a data set"]),
    "vocabulary size that is not the data's": (lambda store, tmp: {"vocab_size": 100}, ["--vocab_size 100", "512"]),
    "two ways to go on": (
        lambda store, tmp: {"new_data": "true", "allow_changed_data": "true"},
        ["--new_data", "--allow_changed_data", "Choose one"],
    ),
    "validation without a target": (
        lambda store, tmp: {"val_data_dir": one_token_documents(tmp / "one")},
        ["--val_data_dir", "no token of it is a target", "40 tokens in 40 documents"],
    ),
    "first row of the validation without a target": (
        lambda store, tmp: {"val_data_dir": one_token_documents(tmp / "one", and_a_longer=True), "eval_max_rows": 1},
        ["no token of its first 1 rows (--eval_max_rows) is a target"],
    ),
    "training data without a target": (
        lambda store, tmp: {"train_data_dir": one_token_documents(tmp / "one")},
        ["one: no token is a target", "documents of two tokens or more"],
    ),
    "tokenizer folder missing": (lambda store, tmp: {"tokenizer_path": tmp / "nowhere"}, ["nowhere"]),
    "run folder is a file": (
        lambda store, tmp: {"out_dir": (tmp / "file").write_text("x") and tmp / "file"},
        ["cannot be written", "--out_dir"],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("mistake", TRAINING)
def test_training(mistake: str, store: Path, tmp_path: Path) -> None:
    make, words = TRAINING[mistake]
    settings = {"out_dir": tmp_path / "out", **make(store, tmp_path)}
    done = run_program(command(store, **settings))  # type: ignore[arg-type]
    assert_refused(done, *words)


@pytest.mark.slow
def test_launchers_world_differs_from_the_settings(store: Path, tmp_path: Path) -> None:
    torchrun = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "4"}
    srun = {"SLURM_JOB_ID": "1", "SLURM_STEP_ID": "0"}
    for extra, words in (
        ({**torchrun, "LOCAL_WORLD_SIZE": "4"}, ["--devices 2", "4 processes"]),
        ({**torchrun, "LOCAL_WORLD_SIZE": "2"}, ["--num_nodes 3", "2 nodes"]),
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "2"}, ["srun"]),
        (
            {**srun, "SLURM_NTASKS": "4", "SLURM_NNODES": "1", "SLURM_NTASKS_PER_NODE": "4"},
            ["--devices 2", "4 processes"],
        ),
        (
            {**srun, "SLURM_NTASKS": "4", "SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "2"},
            ["--num_nodes 3", "2 nodes"],
        ),
        ({**srun, "SLURM_NTASKS": "3", "SLURM_NNODES": "2"}, ["--ntasks-per-node"]),
        ({**srun, "SLURM_NTASKS": "4", "SLURM_NNODES": "2"}, ["--ntasks-per-node=2"]),
    ):
        done = run_program(command(store, tmp_path, devices=2, num_nodes=3), env=environment(**extra))
        assert_refused(done, *words)


def resume(store: Path, run: Path, **settings: object) -> subprocess.CompletedProcess[str]:
    values = {"max_steps": 4, "warmup_steps": 1, "resume": "auto", **settings}
    return run_program(command(store, run, **values), fresh=values.get("devices", 1) != 1)


@pytest.mark.slow
def test_resume_refuses(store: Path, finished: Path, tmp_path: Path) -> None:
    """A checkpoint of another model, a damaged one by name, other data; and a fresh start over a finished run."""
    run = shutil.copytree(finished, tmp_path / "run")
    newest = run / "iter-00000002-ckpt.pth"
    assert_refused(resume(store, run, block_size=32), "another model", "block_size is 64 there, 32 here")
    assert_refused(resume(store, run, global_batch_size=4), "global_batch_size was 8 and is 4", "--allow_changed_data")
    assert_refused(resume(store, run, resume=None), "holds a run already", "--resume auto")
    flip_byte(newest / "state.pth")
    assert_refused(resume(store, run, resume=newest), "state.pth is corrupt")
    facts = json.loads((newest / "MANIFEST.json").read_text())
    facts["state.pth"]["bytes"] += 1
    (newest / "MANIFEST.json").write_text(json.dumps(facts))
    assert_refused(resume(store, run, resume=newest), "state.pth is", "saved as")


@pytest.mark.slow
def test_two_processes_tell_it_once(store: Path, finished: Path, tmp_path: Path) -> None:
    """A mistake that shows only after the processes have started."""
    run = shutil.copytree(finished, tmp_path / "run")
    assert_refused(resume(store, run, resume=None, devices=2), "holds a run already")


def test_nothing_was_left_behind(store: Path, tmp_path: Path) -> None:
    """A refused start has made no run folder that a later one would trip over."""
    done = run_program(command(store, tmp_path / "out", model_name="nonsense"))
    assert done.returncode == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_programs_tell_a_missing_argument() -> None:
    for program in sorted((ROOT / "scripts").glob("*.py")):
        if program.name == "demo.py" or program.name.startswith("benchmark_"):  # need no argument
            continue
        assert_refused(run_program([sys.executable, program], fresh=True))
