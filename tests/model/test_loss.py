"""The fused loss, compared with torch's cross-entropy on whole logits: values and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lit_gpt.config import IGNORE_INDEX
from lit_gpt.model import loss as loss_module
from lit_gpt.model.loss import linear_cross_entropy


@pytest.fixture
def case() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 16, generator=generator)
    weight = torch.randn(96, 16, generator=generator)
    targets = torch.randint(0, 96, (50,), generator=generator)
    targets[::7] = IGNORE_INDEX
    return x.requires_grad_(), weight.requires_grad_(), targets


@pytest.mark.parametrize("chunk_tokens", [1, 16, 50, 64])
def test_equals_cross_entropy_for_every_chunk(
    case: tuple[torch.Tensor, ...], chunk_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_TOKENS", chunk_tokens)
    x, weight, targets = case
    expected = F.cross_entropy(x @ weight.T, targets, ignore_index=IGNORE_INDEX, reduction="sum")
    loss = linear_cross_entropy(x, weight, targets)
    torch.testing.assert_close(loss, expected)
    for got, wanted in zip(
        torch.autograd.grad(loss * 0.125, (x, weight)), torch.autograd.grad(expected * 0.125, (x, weight)), strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


def test_without_gradients(case: tuple[torch.Tensor, ...]) -> None:
    x, weight, targets = case
    with torch.no_grad():
        loss = linear_cross_entropy(x, weight, targets)
    torch.testing.assert_close(loss, F.cross_entropy(x @ weight.T, targets, reduction="sum").detach())


def test_no_valid_target_is_zero_loss_and_zero_gradient(case: tuple[torch.Tensor, ...]) -> None:
    x, weight, targets = case
    loss = linear_cross_entropy(x, weight, torch.full_like(targets, IGNORE_INDEX))
    loss.backward()
    assert loss.item() == 0
    assert not x.grad.any()
    assert not weight.grad.any()


def test_sum_over_parts_is_the_sum_of_the_whole(case: tuple[torch.Tensor, ...]) -> None:
    """The divisor belongs to the step: cutting a batch changes nothing."""
    x, weight, targets = case
    parts = sum(linear_cross_entropy(x[s : s + 10], weight, targets[s : s + 10]) for s in range(0, 50, 10))
    torch.testing.assert_close(parts, linear_cross_entropy(x, weight, targets))


def test_the_scale_of_bf16_gradients_is_fp32(case: tuple[torch.Tensor, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """1 / 3 of each, rounded to bf16 only then; in bf16 the scale itself would be 0.2 % larger."""
    monkeypatch.setattr(loss_module, "CHUNK_TOKENS", 16)
    x, weight, targets = case
    for w in (weight, weight.bfloat16()):
        inputs = x.detach().bfloat16().requires_grad_(), w.detach().requires_grad_()
        plain = torch.autograd.grad(linear_cross_entropy(*inputs, targets), inputs)
        scaled = torch.autograd.grad(linear_cross_entropy(*inputs, targets) * (1 / 3), inputs)
        assert torch.equal(scaled[0], (plain[0].double() / 3).bfloat16())
        torch.testing.assert_close(scaled[1].double(), plain[1].double() / 3, rtol=2**-7, atol=0)
        assert scaled[0].double().norm() / plain[0].double().norm() == pytest.approx(1 / 3, rel=3e-4)


def test_bf16(case: tuple[torch.Tensor, ...]) -> None:
    x, weight, targets = case
    exact = linear_cross_entropy(x, weight, targets)
    rounded = linear_cross_entropy(x.bfloat16(), weight, targets)
    assert rounded.dtype == torch.float32
    assert abs(rounded - exact) / exact < 0.01
    rounded.backward()
    assert weight.grad.dtype == torch.float32
