"""AdamW for bf16 weights: PyTorch's AdamW with stochastic rounding, so that small updates are not lost."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from lit_gpt.train.adamw import AdamW, RoundingAdamW, rounding_update
from lit_gpt.train.optimizer import gradient_norm
from lit_gpt.train.rounding import hashed, stochastic_round

ADAM = dict(lr=1e-3, betas=(0.9, 0.95), eps=1e-8, fused=True)


def random(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).bfloat16()


def steps(kind: type[AdamW], weights: list[Tensor], *, lr: float, count: int, decay: float = 0.0) -> AdamW:
    """Updates of weights, in place, by the same gradients for each kind."""
    further = {"compiled": False} if kind is RoundingAdamW else {}
    optimizer = kind([{"params": weights, "weight_decay": decay}], **(ADAM | {"lr": lr} | further))
    for step in range(count):
        for number, weight in enumerate(weights):
            whole = (1 + random(*weight.shape, seed=97 * step + number, scale=0.1).float()).to(weight.dtype)
            shared = isinstance(weight, DTensor)
            weight.grad = distribute_tensor(whole, weight.device_mesh, weight.placements) if shared else whole
        optimizer.step_clipped(gradient_norm(weights), 1.0, torch.tensor(0.0))
    return optimizer


def test_it_computes_what_pytorchs_does() -> None:
    """In fp32 from the same bf16 weights: after each of some large steps within one last bit, with equal moments."""
    start = [random(40, 30, seed=1), random(50, seed=2)]
    ours, theirs = ([w.clone().requires_grad_() for w in start] for _ in range(2))
    optimizers = [steps(kind, w, lr=0.05, count=1, decay=0.1) for kind, w in ((RoundingAdamW, ours), (AdamW, theirs))]
    for a, b in zip(ours, theirs, strict=True):
        last_bit = 2 ** (b.detach().float().abs().log2().floor() - 7)
        assert ((a - b).abs() <= last_bit).all()
        assert not torch.equal(a, b)  # some are rounded to the other side
        for name, moment in optimizers[0].state[a].items():
            torch.testing.assert_close(moment, optimizers[1].state[b][name], rtol=2**-7, atol=0)


@pytest.mark.slow
def test_small_updates_are_not_lost() -> None:
    """100 updates of 0.001 take 0.1 from weights of 1, whose last bit downwards is 0.0039, and weight decay, each time
    0.0005 of them, 0.05; rounded to the nearest, both take nothing."""
    ours, theirs, exact = (torch.ones(4096, dtype=t) for t in (torch.bfloat16, torch.bfloat16, torch.float32))
    for kind, weight in ((RoundingAdamW, ours), (AdamW, theirs), (AdamW, exact)):
        steps(kind, [weight.requires_grad_()], lr=1e-3, count=100, decay=0.5)
    assert exact.mean().item() == pytest.approx(0.853, abs=0.005)
    assert ours.float().mean().item() == pytest.approx(exact.mean().item(), abs=0.001)
    assert torch.equal(theirs, torch.ones_like(theirs))


def test_second_moments_keep_their_mean() -> None:
    """Gradients of 1, then of 0: each of 500 updates takes a thousandth, a quarter of a last bit."""
    weight = torch.ones(4096, dtype=torch.bfloat16)
    optimizer = RoundingAdamW([{"params": [weight]}], compiled=False, **(ADAM | {"betas": (0.9, 0.999)}))
    for step in range(501):
        weight.grad = torch.full_like(weight, float(step == 0))
        optimizer.step_clipped(torch.tensor(1.0), 0.0, torch.tensor(0.0))
    square = optimizer.state[weight]["exp_avg_sq"].float().mean().item()
    assert square == pytest.approx(0.001 * 0.999**500, rel=0.01)


def test_chance_is_even_and_the_mean_exact() -> None:
    """Of 2^20 elements, by how far x is between two neighbours, here 1 and 1 + 2^-7."""
    chance = hashed(torch.arange(1 << 20, dtype=torch.int32))
    for share in (0.0, 0.25, 0.9):
        rounded = stochastic_round(torch.full((1 << 20,), 1 + share * 2**-7), chance).float()
        assert set(rounded.unique().tolist()) <= {1.0, 1 + 2**-7}
        assert (rounded > 1).float().mean().item() == pytest.approx(share, abs=0.002)
    assert torch.equal(stochastic_round(torch.tensor([-0.0, 3.0, -2.5]), chance[:3]), torch.tensor([-0.0, 3.0, -2.5]))
    neighbours = torch.corrcoef(torch.stack(((chance[1:] & 0xFFFF).float(), (chance[:-1] & 0xFFFF).float())))
    next_step = torch.corrcoef(torch.stack([(hashed(x) & 0xFFFF).float() for x in (chance, chance + 1)]))
    assert abs(neighbours[0, 1].item()) < 0.005
    assert abs(next_step[0, 1].item()) < 0.005


def test_parts_round_as_the_whole_and_each_update_by_itself() -> None:
    gradient, start = random(1000, seed=3), random(1000, seed=4)

    def updated(part: slice, draw: int = 5) -> Tensor:
        weight, mean, square = start[part].clone(), *(torch.zeros_like(start[part]) for _ in range(2))
        place = (torch.tensor(x, dtype=torch.int32) for x in (part.start, draw))
        scalars = (torch.tensor(x) for x in (1.0, 1e-2, 3.0, 0.999, 0.0))
        rounding_update(weight, gradient[part], mean, square, *place, *scalars, betas=(0.9, 0.95), eps=1e-8)
        return weight

    whole = updated(slice(0, 1000))
    assert torch.equal(whole, torch.cat([updated(slice(0, 300)), updated(slice(300, 1000))]))
    assert torch.equal(whole, updated(slice(0, 1000)))
    assert not torch.equal(whole, updated(slice(0, 1000), draw=6))


def test_compiled_it_is_the_same_function() -> None:
    """One graph a size, none for another learning rate, none again for another weight."""
    torch._dynamo.reset()
    weights = [random(*shape, seed=1).requires_grad_() for shape in ((8, 32), (8, 32), (16,))]
    plain = [w.detach().clone().requires_grad_() for w in weights]
    graphs = 0

    def backend(module: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        nonlocal graphs
        graphs += 1
        return module

    optimizers = []
    for parameters, compiled in ((weights, True), (plain, False)):
        groups = [{"params": parameters[:2], "weight_decay": 0.1}, {"params": parameters[2:], "weight_decay": 0.0}]
        optimizer = RoundingAdamW(groups, compiled=False, **ADAM)
        if compiled:
            optimizer._update = torch.compile(rounding_update, backend=backend, fullgraph=True, dynamic=False)
        optimizers.append(optimizer)
    for rate in (1e-3, 2e-3, 3e-3):
        for optimizer, parameters in zip(optimizers, (weights, plain), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate
            for number, weight in enumerate(parameters):
                weight.grad = random(*weight.shape, seed=number)
            optimizer.step_clipped(torch.tensor(1.0), 1.0, torch.tensor(0.0))
    assert graphs == 2
    assert all(torch.equal(a, b) for a, b in zip(weights, plain, strict=True))
