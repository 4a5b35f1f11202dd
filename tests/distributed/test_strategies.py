"""Several processes on this machine (gloo) give the rows, losses and weights of one, for every strategy."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from lit_gpt.checkpoint.checkpoint import model_tensors, verified
from lit_gpt.datapoints.run_record import RunRecord
from lit_gpt.train.settings import ShardingSettings
from tests.support.programs import run_ranks
from tests.support.training import command, full_state, metrics, seen_rows, train
from tests.train.test_step_guard import FAULTY

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def alone(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 steps on one process."""
    out = tmp_path_factory.mktemp("alone")
    train(store, out, micro_batch_size=2, keep_last_checkpoints=0)
    return out


def assert_close_runs(run: Path, alone: Path) -> None:
    """The same rows; sums in another order: 1e-6 in fp32, times what 12 steps make of it."""
    assert seen_rows(run) == seen_rows(alone)
    for got, wanted in zip(metrics(run), metrics(alone), strict=True):
        assert got["targets"] == wanted["targets"]
        assert float(got["loss"]) == pytest.approx(float(wanted["loss"]), rel=1e-5)
        if wanted["val_loss"]:
            assert float(got["val_loss"]) == pytest.approx(float(wanted["val_loss"]), rel=1e-5)


@pytest.mark.parametrize(
    ("strategy", "gradient_sync"),
    [
        ("FULL_SHARD", "step"), ("SHARD_GRAD_OP", "step"), ("HYBRID_SHARD", "step"), ("NO_SHARD", "step"),
        ("FULL_SHARD", "micro_batch"),
    ],
)  # fmt: skip
def test_two_processes_equal_one(store: Path, alone: Path, tmp_path: Path, strategy: str, gradient_sync: str) -> None:
    train(
        store, tmp_path, devices=2, micro_batch_size=2, sharding_strategy=strategy, gradient_sync=gradient_sync,
        state_dict_type="full",
    )  # fmt: skip
    assert_close_runs(tmp_path, alone)
    weights = {name: value for name, value in full_state(alone, 12).items() if name.startswith("model.")}
    for name, value in full_state(tmp_path, 12).items():
        if name in weights:
            assert (value - weights[name]).norm() <= 2e-4 * weights[name].norm(), name


@pytest.mark.parametrize("float8", ["tensorwise", "rowwise"])
def test_float8_and_recomputation(store: Path, tmp_path: Path, float8: str) -> None:
    """Sharded weights are gathered in bf16 before their cast to 8 bits, whole ones are cast from fp32: 2^-8 apart.

    The losses begin 1e-3 apart at most, and part further with each update: up to 1.6e-3 at steps 2 and 3 on one CPU,
    2.4e-3 at step 3 on another.
    """
    settings = dict(
        max_steps=4, warmup_steps=1, micro_batch_size=2, precision="bf16-mixed", float8=float8,
        activation_checkpointing="selective", log_interval_steps=1,
    )  # fmt: skip
    for devices in (1, 2):
        train(store, tmp_path / str(devices), devices=devices, **settings)
    one, two = (metrics(tmp_path / name) for name in ("1", "2"))
    assert seen_rows(tmp_path / "1") == seen_rows(tmp_path / "2")
    for row, other, rel in zip(one, two, (1e-3, 2e-3, 4e-3, 4e-3), strict=True):
        assert float(other["loss"]) == pytest.approx(float(row["loss"]), rel=rel)


def test_hybrid_groups_inside_a_node(store: Path, alone: Path, tmp_path: Path) -> None:
    """Four processes as two copies of the weights, each on two; gradients reduced inside the copies twice a step."""
    train(
        store, tmp_path, devices=4, micro_batch_size=1, sharding_strategy="HYBRID_SHARD", shard_group_size=2,
        gradient_sync="micro_batch", state_dict_type="sharded",
    )  # fmt: skip
    assert_close_runs(tmp_path, alone)
    reference = full_state(alone, 12)
    for name, tensor in model_tensors(verified(tmp_path / "iter-00000012-ckpt.pth")):
        wanted = reference[f"model.{name}"]
        assert (tensor - wanted).norm() <= 2e-4 * wanted.norm(), name


@pytest.mark.parametrize(("group", "mesh"), [(1, (4, 1)), (2, (2, 2)), (4, (1, 4)), (None, (1, 4))])
def test_mesh_of_hybrid_groups(group: int | None, mesh: tuple[int, int]) -> None:
    settings = ShardingSettings(sharding_strategy="HYBRID_SHARD", shard_group_size=group)
    assert settings.mesh_shape(devices=4, world_size=4) == {"replicate": mesh[0], "shard": mesh[1]}
    assert settings.shards(devices=4, world_size=8) == (group or 4)
    assert ShardingSettings(sharding_strategy="NO_SHARD").mesh_shape(4, 8) == {"replicate": 8, "shard": 1}
    assert ShardingSettings().mesh_shape(4, 8) == {"shard": 8}


def test_initial_weights_do_not_depend_on_the_number_of_processes(store: Path, tmp_path: Path) -> None:
    """With a learning rate of almost nothing a checkpoint holds the weights that the run began with."""
    still = dict(max_steps=1, warmup_steps=0, learning_rate=1e-30, min_lr=0, weight_decay=0, state_dict_type="full")
    for devices in (1, 2):
        train(store, tmp_path / str(devices), devices=devices, micro_batch_size=2, **still)
    one, two = (full_state(tmp_path / name, 1) for name in ("1", "2"))
    assert all(torch.equal(one[name], two[name]) for name in one if name.startswith("model."))


@pytest.mark.parametrize(
    ("strategy", "kinds"), [("FULL_SHARD", ("sharded", "full")), ("HYBRID_SHARD", ("full", "sharded"))]
)
def test_resume_on_other_numbers_of_processes(
    store: Path, alone: Path, tmp_path: Path, strategy: str, kinds: tuple[str, str]
) -> None:
    """4 -> 2 -> 1 -> 4 processes, both kinds of checkpoints in turn: no row lost, none twice, the same losses."""
    settings = dict(
        micro_batch_size=2, save_interval_steps=3, eval_interval_steps=6, keep_last_checkpoints=0,
        sharding_strategy=strategy,
    )  # fmt: skip
    for devices, until, kind in zip((4, 2, 1, 4), (3, 6, 9, 12), kinds * 2, strict=True):
        group = 2 if strategy == "HYBRID_SHARD" and devices > 1 else None
        # the schedule is the whole run's, so each part is stopped by keeping only its checkpoints
        settings |= dict(devices=devices, state_dict_type=kind, shard_group_size=group)
        done = train(store, tmp_path, resume="auto", **settings)
        assert done.stderr.count("--devices was ") == (until > 3), "all know it, one tells it"
        for step in range(until + 3, 13, 3):
            shutil.rmtree(tmp_path / f"iter-{step:08d}-ckpt.pth")
    assert_close_runs(tmp_path, alone)
    one_process = verified(tmp_path / "iter-00000009-ckpt.pth")
    reference = full_state(alone, 12)
    for name, tensor in model_tensors(one_process):
        assert tensor.shape == reference[f"model.{name}"].shape
        assert torch.isfinite(tensor).all()


def test_resume_between_equal_worlds_is_exact(store: Path, tmp_path: Path) -> None:
    settings = dict(devices=2, micro_batch_size=2, keep_last_checkpoints=0)
    train(store, tmp_path / "unbroken", **settings)
    shutil.copytree(tmp_path / "unbroken", tmp_path / "resumed")
    for step in (8, 12):
        shutil.rmtree(tmp_path / "resumed" / f"iter-{step:08d}-ckpt.pth")
    train(store, tmp_path / "resumed", resume="auto", **settings)
    assert metrics(tmp_path / "resumed") == metrics(tmp_path / "unbroken")
    one, two = (
        dict(model_tensors(verified(tmp_path / run / "iter-00000012-ckpt.pth"))) for run in ("unbroken", "resumed")
    )
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("strategy", ["FULL_SHARD", "NO_SHARD"])
def test_a_bad_number_on_one_rank_is_skipped_by_all(store: Path, tmp_path: Path, strategy: str) -> None:
    """Ranks that disagreed would hold weights that do not fit together; the reference is one process."""
    faults = "3:1:nan_activation 6:0:inf_gradient 9:1:gradient_x100"
    settings = dict(
        micro_batch_size=2, spike_policy="skip", spike_factor=5, spike_window_steps=4, state_dict_type="full"
    )
    for devices, listed in ((1, faults.replace(":1:", ":0:")), (2, faults)):
        run = tmp_path / str(devices)
        flags = command(store, run, program=FAULTY, devices=devices, sharding_strategy=strategy, **settings)
        done = run_ranks(flags, devices, FAULTS=listed)
        assert done.returncode == 0, done.stderr
        with RunRecord(run / "datapoints") as record:
            found = [(line["step"], line["reason"]) for line in record.deviations()]
        assert found == [(3, "not_finite"), (6, "not_finite"), (9, "spike")]
    one, two = (full_state(tmp_path / name, 12) for name in ("1", "2"))
    for name, value in one.items():
        if name.startswith("model."):
            assert (two[name] - value).norm() <= 2e-4 * value.norm(), name
