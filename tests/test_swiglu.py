"""The fused MLP through a stand-in of the interface of quack-kernels 0.6; tests/gpu has the real one."""

from __future__ import annotations

import importlib.metadata
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lit_gpt.cli import BadInput
from lit_gpt.config import Config
from lit_gpt.model import GPT, initialize
from lit_gpt.swiglu import PACKAGE, choose_mlp, fused_mlp

CPU = torch.device("cpu")


def alternating(halves: Tensor, dim: int) -> Tensor:
    """[a0 a1 ..; b0 b1 ..] along dim to a0 b0 a1 b1 .."""
    return torch.stack(halves.chunk(2, dim=dim), dim=dim + 1).flatten(dim, dim + 1)


def halves(mixed: Tensor, dim: int) -> Tensor:
    return torch.cat([mixed.unflatten(dim, (-1, 2)).select(dim + 1, i) for i in (0, 1)], dim=dim)


def swiglu(mixed: Tensor) -> Tensor:
    return F.silu(mixed[:, 0::2]) * mixed[:, 1::2]


class Quack(ModuleType):
    """concat_layout names the tensors whose halves lie one after the other, where the kernels have them alternate."""

    @staticmethod
    def gemm(
        a: Tensor,
        b: Tensor,
        out_dtype: Any = None,
        tuned: bool = True,
        concat_layout: tuple[str, ...] = (),
        dynamic_scheduler: bool = False,
    ) -> Tensor:
        assert not tuned, "tuning measures dozens of kernels at the start of a run"
        out = a.float() @ (alternating(b, 0) if "B" in concat_layout else b).float()
        return (halves(out, 0) if "out" in concat_layout else out).to(out_dtype or a.dtype)

    @staticmethod
    def gemm_gated(
        a: Tensor, b: Tensor, activation: str, tuned: bool = True, concat_layout: tuple[str, ...] = ()
    ) -> tuple[Tensor, Tensor]:
        assert activation == "swiglu"
        assert concat_layout == ("B",)
        assert not tuned
        mixed = a.float() @ alternating(b, 1).float()
        return mixed.to(a.dtype), swiglu(mixed).to(a.dtype)

    @staticmethod
    def gemm_dgated(
        a: Tensor, b: Tensor, mixed: Tensor, activation: str, tuned: bool = True, config: Any = None
    ) -> tuple[Tensor, Tensor]:
        assert activation == "swiglu"
        assert not tuned
        d_inner = a.float() @ b.float()
        gate, up = mixed.float()[:, 0::2], mixed.float()[:, 1::2]
        sigmoid = gate.sigmoid()
        d_gate = d_inner * up * sigmoid * (1 + gate * (1 - sigmoid))
        d_mixed = torch.stack((d_gate, d_inner * gate * sigmoid), dim=2).flatten(1, 2)
        return d_mixed.to(a.dtype), swiglu(mixed.float()).to(a.dtype)


@pytest.fixture
def quack(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "quack", ModuleType("quack"))
    monkeypatch.setitem(sys.modules, PACKAGE, Quack(PACKAGE))
    config = ModuleType("quack.gemm_config")
    monkeypatch.setattr(config, "GemmConfig", SimpleNamespace, raising=False)
    monkeypatch.setitem(sys.modules, config.__name__, config)


@pytest.mark.usefixtures("quack")
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_value_and_gradients_are_those_of_the_plain_formula(weight_dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 8, generator=generator).bfloat16().requires_grad_()
    gate_up, down = (
        torch.randn(*shape, generator=generator).to(weight_dtype).requires_grad_() for shape in ((20, 8), (8, 10))
    )
    d_out = torch.randn(6, 8, generator=generator).bfloat16()
    out = fused_mlp(x, gate_up, down)
    got = torch.autograd.grad(out, (x, gate_up, down), d_out)
    exact = [t.detach().bfloat16().float().requires_grad_() for t in (x, gate_up, down)]
    gate, up = (exact[0] @ exact[1].T).chunk(2, dim=-1)
    wanted = (F.silu(gate) * up) @ exact[2].T
    assert out.dtype == torch.bfloat16
    assert [g.dtype for g in got] == [torch.bfloat16, weight_dtype, weight_dtype]
    gradients = torch.autograd.grad(wanted, exact, d_out.float())
    for ours, theirs in zip((out, *got), (wanted, *gradients), strict=True):
        torch.testing.assert_close(ours.float(), theirs, rtol=0.02, atol=0.02 * theirs.abs().max().item())


@pytest.mark.usefixtures("quack")
def test_a_model_with_it_is_the_same_model() -> None:
    """Also under torch.compile, in one graph for all blocks."""
    tokens = torch.randint(0, 4096, (2, 32), generator=torch.Generator().manual_seed(0))
    losses, norms = [], []
    for backend, compiled in (("torch", False), ("quack", False), ("quack", True)):
        model = GPT(Config.from_name("debug", block_size=32), mlp_backend=backend, compute_dtype=torch.bfloat16)
        initialize(model, seed=1)
        if compiled:
            for block in model.transformer.h:
                block.compile(fullgraph=True, backend="aot_eager")
        loss = model(tokens, None, tokens.roll(-1, 1))
        loss.backward()
        losses.append(loss.item())
        norms.append(torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]).item())
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-4)
    assert norms[1:] == pytest.approx([norms[0]] * 2, rel=1e-2)


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
