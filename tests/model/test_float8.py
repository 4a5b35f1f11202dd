"""Float8 matmuls on a CPU, which multiplies 8-bit numbers in full precision; tests/gpu tests the kernels."""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_gpt.cli import BadInput
from lit_gpt.config import Config
from lit_gpt.model.float8 import Float8Linear, float8_mlp, use_float8
from lit_gpt.model.float8_casts import E4M3, E5M2, float8_amax, float8_cast
from lit_gpt.model.gpt import GPT, Linear, initialize
from lit_gpt.model.settings import ModelSettings

CPU = torch.device("cpu")


def loss_and_norm(float8: str) -> tuple[float, float]:
    model = GPT(Config.from_name("debug", block_size=32))
    initialize(model, seed=1)
    names = [name for name, _ in model.named_parameters()]
    if float8 != "none":
        use_float8(model.transformer.h, float8, CPU)
    assert [name for name, _ in model.named_parameters()] == names
    tokens = torch.randint(0, 4096, (4, 32), generator=torch.Generator().manual_seed(0))
    loss = model(tokens, None, tokens.roll(-1, 1))
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(gradients) == len(names)
    return loss.item(), torch.nn.utils.get_total_norm(gradients).item()


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_agrees_with_fp32_on_the_same_rows(recipe: str) -> None:
    """e4m3 has 3 bits after the point, so a number is off by 6 % at most; sums over a width average that out."""
    loss, norm = loss_and_norm("none")
    loss_8, norm_8 = loss_and_norm(recipe)
    assert loss_8 != loss
    assert loss_8 == pytest.approx(loss, rel=1e-3)
    assert norm_8 == pytest.approx(norm, rel=0.02)


def results(call: Any, *inputs: Tensor, seed: int = 5) -> list[Tensor]:
    inputs = tuple(x.detach().requires_grad_() for x in inputs)
    out = call(*inputs)
    d_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, inputs, d_out)]


def error(got: Tensor, wanted: Tensor) -> float:
    return ((got.float() - wanted.float()).norm() / wanted.float().norm()).item()


@pytest.fixture(scope="module")
def torchao_linear() -> Any:
    """torchao's tensorwise linear of a weight, emulated."""
    torchao = importlib.import_module("torchao.float8")
    config = replace(torchao.Float8LinearConfig.from_recipe_name("tensorwise"), emulate=True)

    def linear(x: Tensor, weight: Tensor) -> Tensor:
        with torch.device("meta"):
            plain = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
        made = torchao.convert_to_float8_training(nn.Sequential(plain), config=config)
        return torch.func.functional_call(made, {"0.weight": weight}, (x,))

    return linear


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def test_a_linear_agrees_with_torchaos_tensorwise_recipe(torchao_linear: Any) -> None:
    """Both round the same numbers by the same scale: what differs is the order of sums, and one rounding to bf16."""
    x, weight = random(48, 32, seed=1), random(64, 32, seed=2)

    def ours(x: Tensor, weight: Tensor) -> Tensor:
        linear = Float8Linear(Linear(32, 64), compiled_input=True, compiled_gradient=True)
        return torch.func.functional_call(linear, {"weight": weight}, (x,))

    exact = results(F.linear, x.float(), weight.float())
    for got, theirs, wanted in zip(results(ours, x, weight), results(torchao_linear, x, weight), exact, strict=True):
        assert error(got, theirs) < 3e-3
        assert 0.01 < error(got, wanted) < 0.08  # e5m2 is off by up to 12 %, 6 % on average


def test_the_mlp_agrees_with_fp32_as_well_as_torchaos_does(torchao_linear: Any) -> None:
    inputs = random(48, 32, seed=1), random(48, 32, seed=4), random(128, 32, seed=2), random(32, 64, seed=3)

    def plain(linear: Any) -> Any:
        def call(x: Tensor, residual: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
            gate, up = linear(x, gate_up).chunk(2, dim=-1)
            return residual + linear(F.silu(gate) * up, down)

        return call

    exact = results(plain(F.linear), *(x.float() for x in inputs))
    theirs = results(plain(torchao_linear), *inputs)
    for got, torchaos, wanted in zip(results(float8_mlp, *inputs), theirs, exact, strict=True):
        assert error(got, wanted) < 1.1 * error(torchaos, wanted) < 0.12


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_cast(dtype: torch.dtype) -> None:
    """The largest number becomes the type's largest; zeros stay zeros; NaN and infinity stay visible."""
    x = random(3, 5, seed=1)
    straight, transposed, inverse_scale = float8_cast(x, float8_amax(x), dtype, "both")
    assert torch.equal(straight.float().T, transposed.float())
    assert straight.float().abs().max() == torch.finfo(dtype).max
    half_ulp = x.float().abs() * 2 ** -(4 if dtype == E4M3 else 3)
    assert ((straight.float() * inverse_scale - x.float()).abs() <= half_ulp).all()
    zeros, _, _ = float8_cast(torch.zeros(2, 2), float8_amax(torch.zeros(2, 2)), dtype, "rows")
    assert torch.equal(zeros.float(), torch.zeros(2, 2))
    for bad in (float("nan"), float("inf")):
        spoiled = x.clone()
        spoiled[1, 2] = bad
        straight, _, _ = float8_cast(spoiled, float8_amax(spoiled), dtype, "rows")
        assert straight[1, 2].isnan()


def test_only_the_blocks_products_are_exchanged() -> None:
    model = GPT(Config.from_name("debug"))
    use_float8(model.transformer.h, "tensorwise", CPU)
    exchanged = {name.split(".", 3)[-1] for name, module in model.named_modules() if isinstance(module, Float8Linear)}
    assert exchanged == {"attn.qkv", "attn.proj"}
    assert all(block.mlp.fused is float8_mlp for block in model.transformer.h)
    assert type(model.lm_head) is Linear


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadInput, match="0 is 24 x 20, no multiples of 16"):
        use_float8(nn.ModuleList([nn.Linear(20, 24)]), "rowwise", CPU)
    with pytest.raises(
        BadInput, match=r"--float8 rowwise with --precision 32-true. Valid with it: bf16-mixed, bf16-true"
    ):
        ModelSettings(float8="rowwise", precision="32-true").check()
    with pytest.raises(BadInput, match=r"--float8 tensorwise with --mlp quack, .* Valid with it: auto, torch"):
        ModelSettings(float8="tensorwise", mlp="quack").check()

    def missing(name: str) -> Any:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(BadInput, match=r"torchao does not import .*pip install -e '.\[float8\]'"):
        use_float8(nn.ModuleList([nn.Linear(16, 16)]), "rowwise", CPU)
