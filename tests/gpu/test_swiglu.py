"""The MLP fused by quack against fp32."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lit_gpt.swiglu import choose_mlp, fused_mlp

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize(("width", "inner"), [(768, 2048), (2048, 5632)])
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("compiled", [False, True])
def test_against_fp32(width: int, inner: int, weight_dtype: torch.dtype, compiled: bool) -> None:
    """bf16 has 8 bits: each rounding leaves a relative error of some 0.2 % on average."""
    if choose_mlp("auto", torch.device("cuda"), torch.bfloat16, (width, inner)) != "quack":
        pytest.skip("quack-kernels is not installed, or this is no Hopper GPU")
    generator = torch.Generator("cuda").manual_seed(0)

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(*shape, device="cuda", generator=generator)

    x, d_out = random(2048, width).bfloat16(), random(2048, width).bfloat16()
    weights = random(2 * inner, width, scale=0.03).to(weight_dtype), random(width, inner, scale=0.03).to(weight_dtype)
    inputs = [t.requires_grad_() for t in (x, *weights)]
    mlp = torch.compile(fused_mlp, fullgraph=True) if compiled else fused_mlp
    out = mlp(*inputs)
    got = out, *torch.autograd.grad(out, inputs, d_out)
    assert [t.dtype for t in got] == [torch.bfloat16, torch.bfloat16, weight_dtype, weight_dtype]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    gate, up = (exact[0] @ exact[1].T).chunk(2, dim=-1)
    wanted = (F.silu(gate) * up) @ exact[2].T
    for ours, theirs in zip(got, (wanted, *torch.autograd.grad(wanted, exact, d_out.double())), strict=True):
        assert ((ours.double() - theirs).norm() / theirs.norm()).item() < 0.01
