"""The Triton kernel of SwiGLU's gradient against fp32."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lit_gpt.swiglu import gated

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("width", [1024, 5632, 100])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 5e-3), (torch.float32, 1e-6)])
def test_against_fp32(width: int, dtype: torch.dtype, bound: float) -> None:
    """bf16 has 8 bits: rounding once leaves a relative error of some 0.2 % on average."""
    generator = torch.Generator("cuda").manual_seed(0)
    gate_up = torch.randn(2, 7, 2 * width, device="cuda", generator=generator).to(dtype).requires_grad_()
    d_out = torch.randn(2, 7, width, device="cuda", generator=generator).to(dtype)
    (got,) = torch.autograd.grad(gated(gate_up), gate_up, d_out)
    exact = gate_up.detach().double().requires_grad_()
    gate, up = exact.chunk(2, dim=-1)
    (wanted,) = torch.autograd.grad(F.silu(gate) * up, exact, d_out.double())
    assert ((got.double() - wanted).norm() / wanted.norm()).item() < bound
