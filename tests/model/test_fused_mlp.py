"""The fused GEMMs, through a stand-in for quack-kernels 0.6; tests/gpu tests the real one."""

from __future__ import annotations

import importlib.metadata
import sys
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lit_gpt.cli import BadInput
from lit_gpt.config import Config
from lit_gpt.model.fused_mlp import PACKAGE, add_matmul, best_tiles, choose_mlp, fused_mlp
from lit_gpt.model.fused_mlp import _trial as TRIAL
from lit_gpt.model.gpt import GPT, initialize
from tests.support import quack_stand_in
from tests.support.quack_stand_in import Quack

CPU = torch.device("cpu")


@pytest.fixture
def quack(monkeypatch: pytest.MonkeyPatch) -> None:
    quack_stand_in.install(monkeypatch)


def random(*shape: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


def plain_mlp(x: Tensor, residual: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = (x @ gate_up.T).chunk(2, dim=-1)
    return residual + (F.silu(gate) * up) @ down.T


def plain_sum(residual: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    return residual + x @ weight.T


@pytest.mark.usefixtures("quack")
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("function", "plain", "shapes", "weights"),
    [
        (fused_mlp, plain_mlp, [(6, 8), (6, 8)], [(20, 8), (8, 10)]),
        (add_matmul, plain_sum, [(6, 8), (6, 12)], [(8, 12)]),
    ],
)
def test_value_and_gradients_are_those_of_the_plain_formula(
    weight_dtype: torch.dtype, function: Any, plain: Any, shapes: Any, weights: Any
) -> None:
    inputs = [random(*shape, seed=i) for i, shape in enumerate(shapes)]
    inputs += [random(*shape, seed=9 + i, dtype=weight_dtype) for i, shape in enumerate(weights)]
    d_out = random(6, 8, seed=5).detach()
    out = function(*inputs)
    got = torch.autograd.grad(out, inputs, d_out)
    exact = [t.detach().bfloat16().float().requires_grad_() for t in inputs]
    wanted = plain(*exact)
    assert out.dtype == torch.bfloat16
    assert [g.dtype for g in got] == [t.dtype for t in inputs]
    gradients = torch.autograd.grad(wanted, exact, d_out.float())
    for ours, theirs in zip((out, *got), (wanted, *gradients), strict=True):
        torch.testing.assert_close(ours.float(), theirs, rtol=0.02, atol=0.02 * theirs.abs().max().item())


@pytest.mark.parametrize(
    ("shape", "tile", "busy"),
    [
        ((11264, 2048), (256, 176), 0.970),  # gate and up of 1B: 44 * 12 tiles are 4 waves of 132
        ((2048, 5632), (256, 176), 0.970),  # down of 1B
        ((4096, 768), (128, 192), 0.970),  # gate and up of 120M: 32 * 4 tiles, one wave
        ((768, 2048), (128, 192), 0.485),  # down of 120M: half the processors have nothing to do
        ((22016, 4096), (128, 192), 0.959),  # gate and up of 7B
    ],
)
def test_tiles_that_leave_the_fewest_sms_idle(shape: tuple[int, int], tile: tuple[int, int], busy: float) -> None:
    tiles, share = best_tiles(*shape, 132)
    assert tiles[:2] == tile
    assert share == pytest.approx(busy, abs=1e-3)


@pytest.mark.slow
@pytest.mark.usefixtures("quack")
def test_a_weight_of_few_tiles_is_left_to_cublas() -> None:
    """But not gate's and up's, whose rows only quack's kernel puts in order."""
    inputs = [random(*shape, seed=1) for shape in ((2, 2048), (2, 2048), (11264, 2048), (2048, 5632))]
    fused_mlp(*inputs).sum().backward()
    assert Quack.tiles == [(256, 176), (256, 176)]
    Quack.tiles.clear()
    inputs = [random(*shape, seed=1) for shape in ((2, 768), (2, 768), (4096, 768), (768, 2048))]
    fused_mlp(*inputs).sum().backward()
    assert Quack.tiles == [(128, 192)]


@pytest.mark.slow
@pytest.mark.usefixtures("quack")
def test_a_model_with_it_is_the_same_model() -> None:
    """To bf16's rounding, from fp32; also under torch.compile, in one graph for all blocks."""
    tokens = torch.randint(0, 4096, (2, 32), generator=torch.Generator().manual_seed(0))
    losses, norms = [], []
    cases = (torch.float32, "torch", False), *((torch.bfloat16, *x) for x in product(("torch", "quack"), (False, True)))
    for dtype, backend, compiled in cases:
        model = GPT(Config.from_name("debug", block_size=32), mlp_backend=backend, compute_dtype=dtype)
        initialize(model, seed=1)
        if compiled:
            for block in model.transformer.h:
                block.compile(fullgraph=True, backend="aot_eager")
        loss = model(tokens, None, tokens.roll(-1, 1))
        loss.backward()
        losses.append(loss.item())
        norms.append(torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]).item())
    assert losses[1:] == pytest.approx([losses[0]] * 4, rel=1e-4)
    assert norms[1:] == pytest.approx([norms[0]] * 4, rel=1e-2)


def test_the_choice_says_why(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        assert choose_mlp("auto", CPU, torch.bfloat16, (64, 128)) == "torch"
    assert "mlp: torch (asked for: auto); not quack: it needs a Hopper GPU, this run is on cpu" in caplog.text
    assert choose_mlp("torch", CPU, torch.bfloat16, (64, 128)) == "torch"
    with pytest.raises(BadInput, match=r"--mlp quack cannot run here: it needs a Hopper GPU.* Valid here: torch"):
        choose_mlp("quack", CPU, torch.bfloat16, (64, 128))
    with pytest.raises(BadInput, match=r"unknown mlp 'fast'. Valid: auto, quack, torch"):
        choose_mlp("fast", CPU, torch.bfloat16, (64, 128))


@pytest.mark.usefixtures("quack")
def test_on_a_gpu_it_is_taken_in_a_version_that_was_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    installed, capability = "0.6.5", (9, 0)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: installed)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    gpu = torch.device("cuda")
    monkeypatch.setattr("lit_gpt.model.fused_mlp._trial", lambda _, dtype, widths: TRIAL(CPU, dtype, widths))
    assert choose_mlp("auto", gpu, torch.bfloat16, (768, 2048)) == "quack"
    for refused, widths, dtype in (("32", (768, 2048), torch.float32), ("multiples of 16", (768, 100), torch.bfloat16)):
        assert choose_mlp("auto", gpu, dtype, widths) == "torch"
        with pytest.raises(BadInput, match=refused):
            choose_mlp("quack", gpu, dtype, widths)
    capability = (8, 0)
    with pytest.raises(BadInput, match=r"not measured on compute capability 8\.0"):
        choose_mlp("quack", gpu, torch.bfloat16, (768, 2048))
    installed, capability = "0.7.0", (9, 0)
    assert choose_mlp("auto", gpu, torch.bfloat16, (768, 2048)) == "torch"
    with pytest.raises(BadInput, match=r"quack-kernels 0\.7\.0 is installed, whose interface was not tried; 0\.6 was"):
        choose_mlp("quack", gpu, torch.bfloat16, (768, 2048))
    installed = "0.6.5"

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(sys.modules[PACKAGE], "gemm_gated", broken)
    with pytest.raises(BadInput, match=r"--mlp quack cannot run here: its kernels fail.*no kernel image is available"):
        choose_mlp("quack", gpu, torch.bfloat16, (768, 2048))
    assert choose_mlp("auto", gpu, torch.bfloat16, (768, 2048)) == "torch"
