"""quack's fused GEMMs, compared with fp64."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_gpt.model.fused_mlp import add_matmul, choose_mlp, fused_mlp
from tests.model.test_fused_mlp import plain_mlp, plain_sum

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def random(*shape: int, seed: int, scale: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return (scale * torch.randn(*shape, device="cuda", generator=generator)).to(dtype).requires_grad_()


@pytest.mark.parametrize(("width", "inner"), [(768, 2048), (2048, 5632)])
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("what", ["mlp", "sum"])
def test_against_fp64(width: int, inner: int, weight_dtype: torch.dtype, compiled: bool, what: str) -> None:
    """bf16 has 8 bits: each rounding leaves a relative error of some 0.2 % on average."""
    if choose_mlp("auto", torch.device("cuda"), torch.bfloat16, (width, inner)) != "quack":
        pytest.skip("quack-kernels is not installed, or this is no Hopper GPU")
    x, residual, d_out = (random(2048, width, seed=seed) for seed in range(3))
    weight = partial(random, scale=0.03, dtype=weight_dtype)
    function: Any
    if what == "mlp":
        function, plain = fused_mlp, plain_mlp
        inputs = [x, residual, weight(2 * inner, width, seed=3), weight(width, inner, seed=4)]
    else:
        function, plain = add_matmul, plain_sum
        inputs = [residual, random(2048, inner, seed=5), weight(width, inner, seed=4)]
    if compiled:
        function = torch.compile(function, fullgraph=True)
    out = function(*inputs)
    got = out, *torch.autograd.grad(out, inputs, d_out)
    assert [t.dtype for t in got] == [torch.bfloat16, *(t.dtype for t in inputs)]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    wanted = plain(*exact)
    for ours, theirs in zip(got, (wanted, *torch.autograd.grad(wanted, exact, d_out.double())), strict=True):
        assert ((ours.double() - theirs).norm() / theirs.norm()).item() < 0.01
