"""The gated product's own backward pass against autograd's of the plain formula."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lit_gpt.swiglu import gated


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_plain_formula_bit_for_bit(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    gate_up = torch.randn(2, 3, 10, generator=generator).to(dtype).requires_grad_()
    d_out = torch.randn(2, 3, 5, generator=generator).to(dtype)
    gate, up = gate_up.chunk(2, dim=-1)
    plain = F.silu(gate) * up
    ours = gated(gate_up)
    assert torch.equal(ours, plain)
    (wanted,) = torch.autograd.grad(plain, gate_up, d_out)
    (got,) = torch.autograd.grad(ours, gate_up, d_out)
    assert torch.equal(got, wanted)


def test_gradient_by_finite_differences() -> None:
    gate_up = torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    torch.autograd.gradcheck(gated, gate_up)
