"""Muon on sharded weights moves them as one process does, however many ranks share a copy of them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from lit_gpt.checkpoint.checkpoint import model_tensors, verified
from lit_gpt.config import Config
from lit_gpt.model.gpt import GPT, initialize
from lit_gpt.train.matrix_exchange import Matrix, MatrixExchange
from lit_gpt.train.optimizer import gradient_norm, make_optimizer
from lit_gpt.train.settings import OptimizerSettings, StepSettings
from lit_gpt.train.sharding import shard
from tests.support.programs import call_on_ranks
from tests.support.training import metrics, train

pytestmark = pytest.mark.distributed

SHAPE = dict(n_layer=2, n_embd=40, n_head=4, n_query_groups=2, intermediate_size=52, block_size=16, vocab_size=64)
MESHES = {
    "2 ranks": [0, 1],
    "3 ranks": [0, 1, 2],  # rows that they cannot share evenly
    "4 ranks": [0, 1, 2, 3],  # more than matrices of some shapes
    "2 copies on 2 ranks": [[0, 1], [2, 3]],
    "4 copies": [[0], [1], [2], [3]],
}


def make_model(mesh: DeviceMesh | None, precision: str) -> GPT:
    settings = StepSettings(precision=precision, seed=1)  # type: ignore[arg-type]
    dtype = torch.float32 if precision == "32-true" else torch.bfloat16
    with torch.device("meta"):
        model = GPT(Config.from_name("debug", **SHAPE), compute_dtype=dtype)
    if precision == "bf16-true":
        model = model.bfloat16()
    if mesh is not None:
        return shard(model, settings, mesh)  # type: ignore[return-value]
    initialize(model.to_empty(device="cpu"), settings.seed)
    return model


def trained(mesh: DeviceMesh | None, precision: str) -> dict[str, Tensor]:
    """Whole weights and momenta after three updates."""
    model = make_model(mesh, precision)
    muon = OptimizerSettings(
        optimizer="muon", learning_rate=0.02, min_lr=0.0, weight_decay=0.1, muon_cautious_weight_decay=True
    )
    optimizer = make_optimizer(model, muon, compiled=False)
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        for weight in model.parameters():
            whole = torch.randn(weight.shape, generator=generator).to(weight.dtype)
            if isinstance(weight, DTensor):
                whole = distribute_tensor(whole, weight.device_mesh, weight.placements)
            weight.grad = whole
        optimizer.step_clipped(gradient_norm(model.parameters()), 1.0, torch.tensor(0.0))
    momenta = {
        f"momentum {name}": optimizer.state[weight]["momentum_buffer"]
        for name, weight in model.named_parameters()
        if "momentum_buffer" in optimizer.state[weight]
    }
    found = {**dict(model.named_parameters()), **momenta}
    return {name: (t.full_tensor() if isinstance(t, DTensor) else t).detach() for name, t in found.items()}


def round_trip(rank: int) -> None:
    """Weights of 5 rows, of which rank 2 has one and rank 3 none; three matrices for four ranks."""
    mesh = DeviceMesh("cpu", list(range(4)))
    weights = [distribute_tensor(torch.arange(40.0).view(5, 8) + 100 * n, mesh, [Shard(0)]) for n in range(3)]
    for first, rows in ((0, 3), (3, 2), (0, 5), (4, 1)):
        exchange = MatrixExchange([Matrix(weight, first, rows) for weight in weights])
        parts = []
        for matrix in exchange.matrices:
            shard_rows, own = exchange.shard_rows(matrix), exchange.own_rows(matrix)
            local = matrix.weight.to_local()  # type: ignore[attr-defined]
            assert len(local) == len(shard_rows)
            parts.append(local[own.start - shard_rows.start : own.stop - shard_rows.start].reshape(-1))
        sent = torch.cat(parts)
        whole = exchange.gather(sent)
        wanted = [torch.arange(40.0).view(5, 8)[first : first + rows] + 100 * n for n in range(3)][rank::4]
        assert torch.equal(whole, torch.stack(wanted) if wanted else torch.empty(0, rows, 8))
        assert torch.equal(exchange.scatter(whole), sent)


def go_through(rank: int, folder: Path) -> None:
    round_trip(rank)
    for name, ranks in MESHES.items():
        nested = isinstance(ranks[0], list)
        mesh = DeviceMesh("cpu", ranks, mesh_dim_names=("replicate", "shard") if nested else None)
        if rank in mesh.mesh.flatten():
            for precision in ("32-true", "bf16-true"):
                torch.save(trained(mesh, precision), folder / f"{name}, {precision}.{rank}")


def test_any_number_of_ranks_gives_what_one_gives(tmp_path: Path) -> None:
    """In fp32 to its rounding; in bf16 to that of products that sum in another order. All copies have the same
    bits."""
    call_on_ranks(go_through, tmp_path, 4)
    for precision in ("32-true", "bf16-true"):
        start, one = dict(make_model(None, precision).named_parameters()), trained(None, precision)
        assert len([name for name in one if name.startswith("momentum")]) == 8
        for name, ranks in MESHES.items():
            of_ranks = [torch.load(tmp_path / f"{name}, {precision}.{rank}") for rank in torch.tensor(ranks).flatten()]
            for weight, value in one.items():
                found = of_ranks[0][weight]
                assert all(torch.equal(other[weight], found) for other in of_ranks[1:]), (name, weight)
                if precision == "32-true":
                    torch.testing.assert_close(found, value, rtol=1e-6, atol=1e-6)
                apart = (found.float() - value.float()).norm()
                if weight in start:
                    assert apart <= 0.05 * (value.float() - start[weight].float()).norm(), (name, weight)
                else:  # some sums of a gradient's norm end in another bit
                    assert apart <= 1e-3 * value.float().norm(), (name, weight)


def test_a_run_learns_and_goes_on_with_any_number_of_processes(store: Path, tmp_path: Path) -> None:
    """12 steps of 2 processes; from step 8 on again by 2, to the same bits, and by 3 and 1, to the same losses."""
    settings = dict(
        optimizer="muon", learning_rate=1e-2, min_lr=1e-3, global_batch_size=12, micro_batch_size=2,
        save_interval_steps=8, eval_interval_steps=12,
    )  # fmt: skip
    whole = tmp_path / "whole"
    train(store, whole, devices=2, **settings)
    losses = [float(row["loss"]) for row in metrics(whole)]
    assert losses[-1] < losses[0] - 1.0
    for devices, kind in ((2, "sharded"), (3, "sharded"), (1, "full")):
        run = tmp_path / str(devices)
        shutil.copytree(whole, run)
        shutil.rmtree(run / "iter-00000012-ckpt.pth")
        train(store, run, devices=devices, resume="auto", state_dict_type=kind, **settings)
        again = [float(row["loss"]) for row in metrics(run)]
        assert again == (losses if devices == 2 else pytest.approx(losses, rel=1e-5))
    one, two = (dict(model_tensors(verified(run / "iter-00000012-ckpt.pth"))) for run in (whole, tmp_path / "2"))
    assert all(torch.equal(one[name], two[name]) for name in one)
