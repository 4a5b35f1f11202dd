"""The float8 kernels, compared with plain torch versions; float8 matmuls, compared with fp32 and torchao."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_gpt.model.float8 import Float8Linear, float8_mlp
from lit_gpt.model.float8_casts import (
    E4M3,
    E5M2,
    float8_amax,
    float8_cast,
    gated_amax,
    gated_backward_cast,
    gated_cast,
)  # fmt: skip
from lit_gpt.model.gpt import Linear

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
SHAPES = [(512, 768), (160, 5632), (33, 48)]


def random(*shape: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def same(got: Tensor, wanted: Tensor) -> None:
    """Equal but for one step of the 8-bit type where a product with the scale was rounded another way; seldom."""
    got, wanted = got.cpu().float(), wanted.float()
    assert got.shape == wanted.shape
    if not got.numel():
        return
    differ = got != wanted
    assert differ.float().mean() < 0.01
    assert ((got - wanted).abs()[differ] <= 0.26 * wanted.abs()[differ] + 1e-2).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("source", [torch.bfloat16, torch.float32])
def test_cast(shape: tuple[int, int], dtype: torch.dtype, source: torch.dtype) -> None:
    x = random(*shape, seed=1, dtype=source)
    amax = float8_amax(x.cuda())
    assert amax.item() == float8_amax(x).item()
    for layout in ("rows", "columns", "both"):
        got, wanted = float8_cast(x.cuda(), amax, dtype, layout), float8_cast(x, amax.cpu(), dtype, layout)
        for ours, theirs in zip(got[:2], wanted[:2], strict=True):
            same(ours, theirs)
        assert got[2].item() == pytest.approx(wanted[2].item(), rel=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_gated(shape: tuple[int, int]) -> None:
    rows, width = shape
    gate_up, d_inner = random(rows, 2 * width, seed=1), random(rows, width, seed=2)
    amax, amax_d = gated_amax(gate_up, None), gated_amax(gate_up, d_inner)
    on_gpu = gate_up.cuda(), d_inner.cuda()
    assert gated_amax(on_gpu[0], None).item() == pytest.approx(amax.item(), rel=1e-5)
    assert gated_amax(*on_gpu).item() == pytest.approx(amax_d.item(), rel=1e-5)
    got, wanted = gated_cast(on_gpu[0], amax.cuda()), gated_cast(gate_up, amax)
    same(got[0], wanted[0])
    assert got[1].item() == pytest.approx(wanted[1].item(), rel=1e-6)
    results = gated_backward_cast(*on_gpu, amax_d.cuda(), amax.cuda())
    for ours, theirs in zip(results, gated_backward_cast(gate_up, d_inner, amax_d, amax), strict=True):
        if ours.dim():
            same(ours, theirs)
        else:
            assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_visible(bad: float) -> None:
    x = random(64, 64, seed=1).cuda()
    x[3, 5] = bad
    for dtype in (E4M3, E5M2):
        straight, transposed, _ = float8_cast(x, float8_amax(x), dtype, "both")
        assert straight.float()[3, 5].isnan()
        assert transposed.float()[5, 3].isnan()
    gate_up, d_inner = random(64, 64, seed=1).cuda(), random(64, 32, seed=2).cuda()
    d_inner[3, 5] = bad
    d_gate_up, *_ = gated_backward_cast(gate_up, d_inner, gated_amax(gate_up, d_inner), gated_amax(gate_up, None))
    assert d_gate_up.float()[3, 5].isnan()


def results(call: Any, *inputs: Tensor) -> list[Tensor]:
    inputs = tuple(x.detach().requires_grad_() for x in inputs)
    out = call(*inputs)
    d_out = random(*out.shape, seed=9).to(out.device, out.dtype)
    return [out.detach(), *torch.autograd.grad(out, inputs, d_out)]


def error(got: Tensor, wanted: Tensor) -> float:
    return ((got.float() - wanted.float()).norm() / wanted.float().norm()).item()


@pytest.mark.parametrize("compiled", [False, True])
def test_products_against_fp32_and_torchao(compiled: bool) -> None:
    torchao = pytest.importorskip("torchao.float8")
    x, weight = random(512, 256, seed=1).cuda(), random(384, 256, seed=2).cuda()
    with torch.device("meta"):
        linear = Float8Linear(Linear(256, 384), compiled_input=True, compiled_gradient=True)
        plain = nn.Sequential(nn.Linear(256, 384, bias=False, dtype=torch.bfloat16))
    theirs = torchao.convert_to_float8_training(plain, config=torchao.Float8LinearConfig.from_recipe_name("tensorwise"))

    def ours(x: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(linear, {"weight": weight}, (x,))

    exact = results(F.linear, x.float(), weight.float())
    got = results(torch.compile(ours, fullgraph=True) if compiled else ours, x, weight)
    wanted = results(lambda x, w: torch.func.functional_call(theirs, {"0.weight": w}, (x,)), x, weight)
    for a, b, c in zip(got, wanted, exact, strict=True):
        assert error(a, b) < 5e-3
        assert 0.01 < error(a, c) < 0.08


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
def test_mlp_against_fp32(compiled: bool, weight_dtype: torch.dtype) -> None:
    x, residual = random(512, 256, seed=1).cuda(), random(512, 256, seed=3).cuda()
    gate_up, down = (0.1 * random(*shape, seed=2, dtype=weight_dtype).cuda() for shape in ((1408, 256), (256, 704)))

    def plain(x: Tensor, residual: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        gate, up = F.linear(x, gate_up).chunk(2, dim=-1)
        return residual + F.linear(F.silu(gate) * up, down)

    mlp = torch.compile(float8_mlp, fullgraph=True) if compiled else float8_mlp
    inputs = x, residual, gate_up, down
    got = results(mlp, *inputs)
    assert [g.dtype for g in got] == [torch.bfloat16] * 3 + [weight_dtype] * 2
    errors = [error(a, b) for a, b in zip(got, results(plain, *(t.float() for t in inputs)), strict=True)]
    assert errors.pop(2) < 2**-8  # the residual's gradient is the output's, rounded to bf16
    assert all(0.01 < e < 0.12 for e in errors)
