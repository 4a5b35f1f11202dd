"""The training program as a user runs it: it learns, resumes exactly, stops cleanly, and keeps its golden losses."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import yaml

from lit_gpt.checkpoint.checkpoint import model_tensors, verified
from lit_gpt.cli import BadInput
from lit_gpt.datapoints import run_folder
from tests.support.programs import environment, run_program, start_program
from tests.support.training import command, full_state, make_store, metrics, seen_rows, train

GOLDEN = Path(__file__).parents[1] / "golden" / "golden_loss_debug_fp32.json"


@pytest.fixture(scope="module")
def unbroken(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 12 steps that nothing interrupts."""
    out = tmp_path_factory.mktemp("unbroken")
    train(store, out, keep_last_checkpoints=0)
    return out


def assert_equal_runs(run: Path, unbroken: Path) -> None:
    assert metrics(run) == metrics(unbroken)
    assert seen_rows(run) == seen_rows(unbroken)
    got, wanted = full_state(run, 12), full_state(unbroken, 12)
    assert got.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(got[name], wanted[name])] == []


def test_golden_losses(tmp_path: Path) -> None:
    """Losses of 20 steps of `debug` on a CPU in fp32. A change that is not meant to change results must keep them.

    The file is changed by hand only (CONTRIBUTING.md). Machines differ in the order of their sums: about 1e-6 here.
    """
    store = make_store(tmp_path / "store")
    golden = json.loads(GOLDEN.read_text())
    train(store, tmp_path / "run", max_steps=20, save_interval_steps=20, eval_interval_steps=20)
    lines = metrics(tmp_path / "run")
    assert [float(line["loss"]) for line in lines] == pytest.approx(golden["loss"], rel=2e-5)
    assert [float(line["grad_norm"]) for line in lines] == pytest.approx(golden["grad_norm"], rel=2e-4)
    assert float(lines[-1]["val_loss"]) == pytest.approx(golden["val_loss"], rel=2e-5)
    assert seen_rows(tmp_path / "run")[20][3] == golden["digest_of_step_20"]


@pytest.mark.slow
def test_it_learns(unbroken: Path) -> None:
    losses = [float(line["loss"]) for line in metrics(unbroken)]
    assert losses[0] == pytest.approx(6.44, abs=0.05)  # ln 512, and half the variance 2 / 5 of its first logits
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.slow
def test_run_folder(unbroken: Path, store: Path, tmp_path: Path) -> None:
    """The settings file alone repeats the run, and says where `auto` and None stand for something else by now."""
    settings = yaml.safe_load((unbroken / "settings.yaml").read_text())
    assert settings["model_name"] == "debug"
    assert "resume" not in settings
    assert json.loads((unbroken / "environment.json").read_text())["packages"]["lightning"] == "2.6.6"
    assert settings["attention"] == "auto"
    resolved = json.loads((unbroken / "resolved.json").read_text())
    assert (resolved["attention"], resolved["compile"], resolved["state_dict_type"]) == ("torch", False, "full")
    checkpoint = json.loads((unbroken / "iter-00000012-ckpt.pth" / "run.json").read_text())
    assert checkpoint["resolved"] == resolved
    elsewhere, again = tmp_path / "elsewhere", tmp_path / "again"
    elsewhere.mkdir()
    (elsewhere / "settings.yaml").write_text((unbroken / "settings.yaml").read_text())
    (elsewhere / "resolved.json").write_text(json.dumps({**resolved, "attention": "fa4"}))
    repeat = [*command(store, again)[:2], "--config", str(elsewhere / "settings.yaml"), "--out_dir", str(again)]
    done = run_program(repeat)
    assert done.returncode == 0, done.stderr
    assert_equal_runs(again, unbroken)
    told = [line for line in done.stderr.splitlines() if "in the run that this one repeats" in line]
    assert [line.split(" WARNING ")[1] for line in told] == [
        "attention: torch here, fa4 in the run that this one repeats or resumes"
    ]


@pytest.mark.slow
@pytest.mark.parametrize("after_step", [2, 5, 9])
def test_killed_and_resumed_equals_unbroken(store: Path, unbroken: Path, tmp_path: Path, after_step: int) -> None:
    """SIGKILL in the middle; then --resume auto: weights, optimizer, RNG, losses and rows are bit-identical."""
    process = start_program(command(store, tmp_path, keep_last_checkpoints=0, async_save="true"))
    log = tmp_path / "datapoints" / "steps.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and len(log.read_text().splitlines()) >= after_step):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.wait()
    train(store, tmp_path, resume="auto", keep_last_checkpoints=0)
    assert_equal_runs(tmp_path, unbroken)


@pytest.mark.slow
def test_resume_from_a_named_checkpoint(store: Path, unbroken: Path, tmp_path: Path) -> None:
    """In another run folder, by the folder's name and by the file's."""
    for number, path in enumerate(("iter-00000008-ckpt.pth", "iter-00000008-ckpt.pth/state.pth")):
        run = tmp_path / str(number)
        train(store, run, resume=unbroken / path)
        assert metrics(run) == metrics(unbroken)[8:]
        assert torch.equal(
            full_state(run, 12)["model.lm_head.weight"], full_state(unbroken, 12)["model.lm_head.weight"]
        )


def test_ranks_make_the_run_folder_at_once(tmp_path: Path) -> None:
    """Each tries whether it can write there, and leaves nothing behind."""
    with ThreadPoolExecutor(8) as ranks:
        list(ranks.map(run_folder.create, [tmp_path / "run"] * 2000))
    assert list((tmp_path / "run").iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(BadInput, match="run cannot be written"):
        run_folder.create(tmp_path / "file" / "run")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "sharded"])
def test_weights_that_are_rounded_at_random_resume_exactly(store: Path, tmp_path: Path, kind: str) -> None:
    settings = dict(precision="bf16-true", state_dict_type=kind, save_interval_steps=4, keep_last_checkpoints=0)
    train(store, tmp_path / "unbroken", **settings)
    train(store, tmp_path / "resumed", resume=tmp_path / "unbroken" / "iter-00000004-ckpt.pth", **settings)
    assert metrics(tmp_path / "resumed") == metrics(tmp_path / "unbroken")[4:]
    ends = [verified(tmp_path / name / "iter-00000012-ckpt.pth") for name in ("unbroken", "resumed")]
    for (name, ours), (_, theirs) in zip(*(model_tensors(end) for end in ends), strict=True):
        assert torch.equal(ours, theirs), name


@pytest.mark.slow
def test_micro_batch_size_does_not_change_the_result(store: Path, unbroken: Path, tmp_path: Path) -> None:
    train(store, tmp_path, micro_batch_size=2)
    assert seen_rows(tmp_path) == seen_rows(unbroken)
    for got, wanted in zip(metrics(tmp_path), metrics(unbroken), strict=True):
        assert float(got["loss"]) == pytest.approx(float(wanted["loss"]), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "in_slurm"),
    [(signal.SIGTERM, False), (signal.SIGUSR1, True), (signal.SIGUSR2, False), (signal.SIGINT, False)],
)
def test_a_signal_saves_and_stops(store: Path, tmp_path: Path, number: signal.Signals, in_slurm: bool) -> None:
    extra = {"SLURM_JOB_ID": "1"} if in_slurm else {}
    flags = command(store, tmp_path, max_steps=5000, save_interval_steps=5000, max_epochs=1000)
    with (tmp_path / "log").open("w") as stderr:
        process = start_program(flags, stderr=stderr, **extra)
    while not (tmp_path / "metrics.csv").exists() or not metrics(tmp_path):
        assert process.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.02)
    process.send_signal(number)
    code, log = process.wait(timeout=60), (tmp_path / "log").read_text()
    assert code == (75 if in_slurm else 0), log
    assert f"stopped by a signal ({number.name})" in log
    last = metrics(tmp_path)[-1]["step"]
    assert (tmp_path / f"iter-{int(last):08d}-ckpt.pth" / "MANIFEST.json").is_file()


@pytest.mark.slow
def test_deterministic_runs_agree(store: Path, tmp_path: Path) -> None:
    """With compiled blocks and two threads, where sums could be cut up differently."""
    for name in ("1", "2"):
        flags = [*command(store, tmp_path / name, compile="true"), "--deterministic"]
        done = run_program(flags, env=environment(OMP_NUM_THREADS="2"), fresh=True)
        assert done.returncode == 0, done.stderr
    assert_equal_runs(tmp_path / "1", tmp_path / "2")


@pytest.mark.slow
def test_deterministic_reaches_torch_and_cublas() -> None:
    code = (
        "import os, torch, lit_gpt.launch.world as s; s.be_deterministic()\n"
        "print(torch.are_deterministic_algorithms_enabled(), torch._inductor.config.deterministic)\n"
        "print(os.environ['CUBLAS_WORKSPACE_CONFIG'])"
    )
    program = [command(Path(), Path())[0], "-c", code]
    clean = {name: value for name, value in environment().items() if name != "CUBLAS_WORKSPACE_CONFIG"}
    done = subprocess.run(program, env=clean, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True", ":4096:8"]
    other = {**clean, "CUBLAS_WORKSPACE_CONFIG": ":0:0"}
    done = subprocess.run(program, env=other, capture_output=True, text=True, check=False)
    assert "CUBLAS_WORKSPACE_CONFIG=:0:0 in the environment: unset it. Valid: :4096:8, :16:8" in done.stderr


@pytest.mark.slow
def test_the_end_of_the_data_stops_the_run(store: Path, tmp_path: Path) -> None:
    sizes = dict(max_steps=None, global_batch_size=32, micro_batch_size=32, eval_interval_steps=100)
    done = train(store, tmp_path, **sizes)
    steps = len(seen_rows(tmp_path))
    assert f"finished at step {steps} (max_epochs)" in done.stderr
    checkpoint = tmp_path / f"iter-{steps:08d}-ckpt.pth"
    assert checkpoint.is_dir()
    assert done.stderr.endswith(f"create.sh {checkpoint}\n")
    twice = tmp_path / "twice"
    train(store, twice, max_epochs=2, **sizes)
    assert 2 * steps <= len(seen_rows(twice)) <= 2 * steps + 1


@pytest.mark.slow
def test_resume_in_the_second_epoch(store: Path, tmp_path: Path) -> None:
    """The rows, losses and weights are those of the run that nothing interrupted."""
    sizes = dict(max_steps=40, global_batch_size=32, micro_batch_size=32, max_epochs=2, eval_interval_steps=100)
    sizes |= dict(save_interval_steps=5, keep_last_checkpoints=0)
    train(store, tmp_path / "unbroken", **sizes)
    lines = metrics(tmp_path / "unbroken")
    first_of_second = next(int(line["step"]) for line in lines if line["epoch"] == "1")
    last = int(lines[-1]["step"])
    assert lines[-1]["epoch"] == "1"
    after = first_of_second // 5 * 5 + 5
    assert lines[after - 1]["epoch"] == lines[after]["epoch"] == "1"
    run = tmp_path / "resumed"
    train(store, run, resume=tmp_path / "unbroken" / f"iter-{after:08d}-ckpt.pth", **sizes)
    assert metrics(run) == lines[after:]
    rows = seen_rows(tmp_path / "unbroken")
    assert seen_rows(run) == {step: row for step, row in rows.items() if step > after}
    weights = [full_state(path, last)["model.lm_head.weight"] for path in (run, tmp_path / "unbroken")]
    assert torch.equal(*weights)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on CPUs")
def test_compiled_and_plain_blocks_load_each_other(store: Path, unbroken: Path, tmp_path: Path) -> None:
    """plain -> compiled -> plain: the same names, and the losses of plain blocks to 1e-4."""
    for until, compiled in ((8, True), (12, False)):
        train(store, tmp_path, resume=unbroken / "iter-00000004-ckpt.pth" if compiled else "auto", compile=compiled)
        for step in range(until + 4, 13, 4):
            shutil.rmtree(tmp_path / f"iter-{step:08d}-ckpt.pth")
    assert full_state(tmp_path, 8).keys() == full_state(unbroken, 8).keys()
    got = {line["step"]: float(line["loss"]) for line in metrics(tmp_path)}
    for line in metrics(unbroken)[4:]:
        assert got[line["step"]] == pytest.approx(float(line["loss"]), rel=1e-4)


@pytest.mark.slow
def test_every_nth_checkpoint_stays(store: Path, tmp_path: Path) -> None:
    train(store, tmp_path, save_interval_steps=1, keep_last_checkpoints=1, keep_every_steps=5, async_save="true")
    names = sorted(path.name for path in tmp_path.glob("iter-*"))
    assert names == [f"iter-{step:08d}-ckpt.pth" for step in (5, 10, 12)]


@pytest.mark.slow
def test_weights_that_are_not_finite_end_with_74(store: Path, tmp_path: Path) -> None:
    """A learning rate that blows the weights up: nothing is saved, and the exit code says so."""
    wild = dict(learning_rate=1e300, min_lr=1e300, warmup_steps=0, max_steps=8)
    done = train(store, tmp_path, expect=74, **wild)
    assert "checkpoint of step 8 was NOT saved: the weights are not finite numbers" in done.stderr
    assert not list(tmp_path.glob("iter-*"))


@pytest.mark.slow
def test_old_checkpoints_are_pruned(store: Path, tmp_path: Path) -> None:
    train(store, tmp_path, save_interval_steps=2, keep_last_checkpoints=3)
    assert sorted(path.name for path in tmp_path.glob("iter-*")) == [
        f"iter-{step:08d}-ckpt.pth" for step in (8, 10, 12)
    ]
    assert not list(tmp_path.glob(".saving*")) + list(tmp_path.glob(".removing*"))


def test_help_needs_no_torch() -> None:
    """`--help` is instant, and names every setting."""
    code = (
        "import sys, runpy; sys.argv = ['x', '--help']\n"
        f"try: runpy.run_path({command(Path(), Path())[1]!r}, run_name='__main__')\n"
        "except SystemExit as e: assert not e.code, e.code\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([command(Path(), Path())[0], "-c", code], capture_output=True, text=True, check=True)
    assert "--sharding_strategy" in done.stdout
    assert "Rows per step, over all ranks (default: 1024)" in " ".join(done.stdout.split())
