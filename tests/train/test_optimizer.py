"""Schedules by literal values, parameter groups, clipping."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lit_gpt.config import Config
from lit_gpt.model.gpt import GPT, initialize
from lit_gpt.train.optimizer import gradient_norm, learning_rate, make_optimizer, parameter_groups
from lit_gpt.train.settings import OptimizerSettings

COSINE = OptimizerSettings(learning_rate=1.0, min_lr=0.1, warmup_steps=4, max_steps=13)
WSD = OptimizerSettings(learning_rate=1.0, min_lr=0.2, warmup_steps=2, max_steps=10, lr_schedule="wsd", decay_steps=5)


def test_cosine_with_warm_up() -> None:
    rates = [learning_rate(step, COSINE) for step in range(13)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0  # the cosine starts at its peak
    assert rates[8] == pytest.approx(0.55)  # half way between 1 and 0.1
    assert rates[12] == pytest.approx(0.1)  # the last update
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[6] == pytest.approx(0.1 + 0.9 * (1 + 2**-0.5) / 2)  # a quarter of the way: cos(pi / 4)


@pytest.mark.parametrize(
    ("warmup_steps", "max_steps", "rates"),
    [(0, 3, [1.0, 0.55, 0.1]), (2, 3, [0.5, 1.0, 0.1]), (3, 3, [1 / 3, 2 / 3, 1.0]), (0, 1, [0.1])],
)
def test_a_short_cosine_ends_at_the_lowest_rate(warmup_steps: int, max_steps: int, rates: list[float]) -> None:
    """Unless the last update belongs to the warm-up."""
    settings = replace(COSINE, warmup_steps=warmup_steps, max_steps=max_steps)
    assert [learning_rate(step, settings) for step in range(max_steps)] == pytest.approx(rates)
    assert learning_rate(max_steps + 5, settings) == pytest.approx(0.1)


def test_warm_up_stable_decay() -> None:
    """decay_steps updates lie below the peak, each a fifth (or all) of the way lower."""
    rates = [learning_rate(step, WSD) for step in range(10)]
    assert rates == pytest.approx([0.5, 1.0, 1.0, 1.0, 1.0, 0.84, 0.68, 0.52, 0.36, 0.2])
    at_once = [learning_rate(step, replace(WSD, decay_steps=1)) for step in range(10)]
    assert at_once == pytest.approx([0.5, *[1.0] * 8, 0.2])
    all_the_way = replace(WSD, decay_steps=10, warmup_steps=0)
    assert [learning_rate(step, all_the_way) for step in (0, 4, 9)] == pytest.approx([0.92, 0.6, 0.2])
    assert learning_rate(25, WSD) == pytest.approx(0.2)  # beyond the end


def test_constant() -> None:
    settings = OptimizerSettings(learning_rate=0.5, min_lr=0.1, warmup_steps=1, max_steps=5, lr_schedule="constant")
    assert [learning_rate(step, settings) for step in range(5)] == [0.5] * 5


def test_published_recipe() -> None:
    settings = OptimizerSettings(max_steps=1_430_512)
    assert learning_rate(0, settings) == pytest.approx(2.5e-4 / 2000)
    assert learning_rate(1999, settings) == 2.5e-4
    assert learning_rate(1_430_511, settings) == pytest.approx(4e-6)


def test_norms_do_not_decay() -> None:
    model = GPT(Config.from_name("debug"))
    decaying, plain = parameter_groups(model, 0.1)
    names = {id(p): name for name, p in model.named_parameters()}
    assert all("norm" in names[id(p)] or "ln_f" in names[id(p)] for p in plain["params"])
    assert len(plain["params"]) == 2 * 4 + 1
    assert len(decaying["params"]) == 4 * 4 + 2
    assert (decaying["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)


def test_adamw_first_step_by_hand() -> None:
    """After one step Adam moves each weight by lr against the gradient's sign, after decaying it by lr x 0.1."""
    model = GPT(Config.from_name("debug", n_layer=1))
    initialize(model, seed=1)
    before = model.lm_head.weight.detach().clone()
    optimizer = make_optimizer(model, OptimizerSettings(learning_rate=0.01, weight_decay=0.1), compiled=False)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    torch.testing.assert_close(model.lm_head.weight, before * (1 - 0.001) - 0.01, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("max_norm", "factor"), [(10.0, 1.0), (1.0, 0.2), (0.0, 1.0)])
def test_clipping(max_norm: float, factor: float, dtype: torch.dtype) -> None:
    """Gradients (3, 0) and (4): norm 5. The first moment after a step is 1 - beta1 = 0.1 of what AdamW took."""
    model = torch.nn.ParameterList([torch.zeros(n, dtype=dtype) for n in (2, 1, 1)])
    optimizer = make_optimizer(model, OptimizerSettings(), compiled=False)
    one, two, _ = model
    one.grad, two.grad = torch.tensor([3.0, 0.0], dtype=dtype), torch.tensor([4.0], dtype=dtype)
    norm = gradient_norm(model)
    assert norm.item() == pytest.approx(5)
    optimizer.step_clipped(norm, max_norm, skip=torch.tensor(0.0))
    for weight, moment in ((one, [0.3 * factor, 0.0]), (two, [0.4 * factor])):
        torch.testing.assert_close(optimizer.state[weight]["exp_avg"], torch.tensor(moment, dtype=dtype))


def test_the_norm_of_bf16_gradients_is_fp32() -> None:
    """sqrt(5); the next bf16 number is 2.234375. And of a million times 1 / 64, where a bf16 sum would stand still."""
    for gradient, norm in (([1.0, 2.0], 5**0.5), ([1 / 64] * 1_000_000, 15.625)):
        weight = torch.nn.Parameter(torch.zeros(len(gradient), dtype=torch.bfloat16))
        weight.grad = torch.tensor(gradient, dtype=torch.bfloat16)
        found = gradient_norm([weight])
        assert found.dtype == torch.float32
        assert found.item() == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_skipped_update_changes_nothing(poison: float, dtype: torch.dtype) -> None:
    """Not the weights, not the moments, not their count, although the gradients are poisoned."""
    model = torch.nn.ParameterList([torch.ones(2, dtype=dtype), torch.ones(3, 2, dtype=dtype)])
    optimizer = make_optimizer(model, OptimizerSettings(learning_rate=0.1), compiled=False)
    states = []
    for gradient, skip in ((1.0, 0.0), (poison, 1.0)):
        for p in model:
            p.grad = torch.full_like(p, gradient)
        optimizer.step_clipped(gradient_norm(model), 1.0, skip=torch.tensor(skip))
        moments = [tensor for p in model for tensor in optimizer.state[p].values()]
        states.append([tensor.detach().clone() for tensor in (*model, *moments)])
    assert not torch.equal(states[0][0], torch.ones(2, dtype=dtype))
    assert all(torch.equal(before, after) for before, after in zip(*states, strict=True))
