"""Muon: its update against numpy in fp64, what it splits, what it leaves to AdamW, and when it changes nothing."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lit_gpt.checkpoint.checkpoint import load, verified
from lit_gpt.checkpoint.saver import CheckpointSaver
from lit_gpt.cli import BadInput
from lit_gpt.config import Config
from lit_gpt.model.gpt import GPT, initialize
from lit_gpt.train import muon
from lit_gpt.train.adamw import AdamW
from lit_gpt.train.muon import Muon, orthogonalized
from lit_gpt.train.optimizer import gradient_norm, make_optimizer, require_same_optimizer
from lit_gpt.train.settings import OptimizerSettings, Settings

COEFFICIENTS = [
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
]
MUON = OptimizerSettings(optimizer="muon", learning_rate=0.02, min_lr=0.0, weight_decay=0.1)
SHAPE = dict(n_layer=2, n_embd=64, n_head=4, n_query_groups=2, intermediate_size=96, block_size=16, vocab_size=64)
PARTS = {  # of a block of SHAPE: rows of q, k and v, of gate and up
    "attn.qkv": [(0, 64), (64, 32), (96, 32)],
    "attn.proj": [(0, 64)],
    "mlp.gate_up": [(0, 96), (96, 96)],
    "mlp.down": [(0, 64)],
}


def make_model(dtype: torch.dtype = torch.float32, compute: torch.dtype = torch.float32) -> GPT:
    model = GPT(Config.from_name("debug", **SHAPE), compute_dtype=compute)
    initialize(model, seed=1)
    return model.to(dtype)


def set_gradients(model: GPT, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for weight in model.parameters():
        weight.grad = (1e-3 * torch.randn(weight.shape, generator=generator)).to(weight.dtype)


def in_fp64(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def polar_express(x: np.ndarray) -> np.ndarray:
    """By the singular values, without a product of the iteration."""
    u, s, v = np.linalg.svd(x, full_matrices=False)
    s = s / (1.02 * np.sqrt((s**2).sum()))
    for a, b, c in COEFFICIENTS:
        s = a * s + b * s**3 + c * s**5
    return np.asarray(u * s @ v)


class Reference:
    """Muon of a weight in fp64, from its definition."""

    def __init__(self, weight: Tensor, parts: list[tuple[int, int]]) -> None:
        self.weight, self.parts = in_fp64(weight), parts
        self.momentum = np.zeros_like(self.weight)

    def step(self, gradient: np.ndarray, lr: float, decay: float, momentum: float, cautious: bool) -> None:
        self.momentum = momentum * self.momentum + (1 - momentum) * gradient
        nesterov = momentum * self.momentum + (1 - momentum) * gradient
        for first, rows in self.parts:
            part = self.weight[first : first + rows]  # a view
            update = 0.2 * math.sqrt(max(part.shape)) * polar_express(nesterov[first : first + rows])
            decayed = part * (np.sign(part) == np.sign(update)) if cautious else part
            part -= lr * (decay * decayed + update)


@pytest.mark.parametrize("cautious", [False, True])
def test_the_update_is_that_of_fp64(cautious: bool) -> None:
    """Three updates of all kinds of matrices, with gradients that are clipped to a fifth."""
    model = make_model()
    settings = OptimizerSettings(
        optimizer="muon", weight_decay=0.1, muon_momentum=0.9, muon_cautious_weight_decay=cautious
    )
    optimizer = make_optimizer(model, settings, compiled=False)
    kinds = {f"transformer.h.{n}.{name}.weight": parts for n in (0, 1) for name, parts in PARTS.items()}
    weights = dict(model.named_parameters())
    references = {name: Reference(weights[name], parts) for name, parts in kinds.items()}
    for step, lr in enumerate((0.02, 0.01, 0.03)):
        set_gradients(model, step)
        norm = gradient_norm(model.parameters())
        for name, reference in references.items():
            reference.step(in_fp64(weights[name].grad) / 5, lr, 0.1, 0.9, cautious)  # type: ignore[arg-type]
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step_clipped(norm, float(norm) / 5, torch.tensor(0.0))
    for name, reference in references.items():
        moved = np.abs(in_fp64(weights[name]) - reference.weight).max()
        assert moved < 2e-6, name  # of updates of 0.2 * 0.06
        state = optimizer.state[weights[name]]
        assert set(state) == {"step", "momentum_buffer"}
        assert float(state["step"]) == 3
        np.testing.assert_allclose(in_fp64(state["momentum_buffer"]), reference.momentum, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("shape", [(48, 48), (32, 128), (128, 32), (1, 7)])
def test_singular_values_become_about_one(shape: tuple[int, int]) -> None:
    """In fp32 to fp32's rounding the iteration in fp64; in bf16 near the orthogonal matrix itself."""
    x = torch.randn(5, *shape, generator=torch.Generator().manual_seed(3)) * torch.logspace(-6, 6, 5).view(5, 1, 1)
    exact = np.stack([polar_express(matrix) for matrix in in_fp64(x)])
    np.testing.assert_allclose(in_fp64(orthogonalized(x.clone())), exact, atol=1e-4)
    u, _, v = np.linalg.svd(in_fp64(x), full_matrices=False)
    found = in_fp64(orthogonalized(x.bfloat16()))
    if shape != (48, 48):  # whose smallest singular values are below a thousandth
        assert np.linalg.norm(found - u @ v, axis=(1, 2)).max() < 0.16 * math.sqrt(min(shape))
    singular = np.linalg.svd(found, compute_uv=False)
    assert singular.max() < 1.16
    assert np.isfinite(found).all()
    assert (orthogonalized(torch.zeros(2, *shape)) == 0).all()


def test_the_coefficients_suit_the_interval() -> None:
    """Their composition takes every singular value from a thousandth of the Frobenius norm up to 1 +- 0.16."""
    s = np.logspace(-3, 0, 10_001) / 1.02
    for a, b, c in muon.POLAR_EXPRESS:
        s = a * s + b * s**3 + c * s**5
    assert (s.min() > 0.84, s.max() < 1.16) == (True, True)


def test_adamw_has_the_others() -> None:
    """Embedding, head and norms move as they do without Muon, in fp32 and, with the same count of updates, in bf16."""
    for dtype in (torch.float32, torch.bfloat16):
        ours, theirs = make_model(dtype), make_model(dtype)
        optimizers = [make_optimizer(ours, MUON, compiled=False)]
        optimizers.append(make_optimizer(theirs, OptimizerSettings(learning_rate=0.02, min_lr=0.0), compiled=False))
        for step in range(2):
            for model, optimizer in zip((ours, theirs), optimizers, strict=True):
                set_gradients(model, step)
                optimizer.step_clipped(gradient_norm(model.parameters()), 1.0, torch.tensor(0.0))
        hidden = {id(weight) for weight, _ in ours.hidden_matrices()}
        assert len(hidden) == 8
        for (name, ours_), theirs_ in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            if id(ours_) in hidden:
                assert not torch.equal(ours_, theirs_), name
            else:  # in bf16 the bits that round differ
                assert (ours_ - theirs_).abs().max() <= (0 if dtype == torch.float32 else 2**-7), name
                assert set(optimizers[0].state[ours_]) == {"step", "exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_skipped_update_changes_nothing(poison: float, dtype: torch.dtype) -> None:
    """Not the weights, not momentum and moments, not their count, although all gradients are poisoned."""
    model = make_model(dtype, torch.bfloat16)
    optimizer = make_optimizer(model, MUON, compiled=False)
    set_gradients(model, 0)
    optimizer.step_clipped(gradient_norm(model.parameters()), 1.0, torch.tensor(0.0))

    def state() -> list[Tensor]:
        tensors = [t for weight in model.parameters() for t in (weight, *optimizer.state[weight].values())]
        return [tensor.detach().clone() for tensor in tensors]

    before = state()
    for weight in model.parameters():
        weight.grad = torch.full_like(weight, poison)
    optimizer.step_clipped(gradient_norm(model.parameters()), 1.0, torch.tensor(1.0))
    assert all(torch.equal(a, b) for a, b in zip(before, state(), strict=True))
    set_gradients(model, 1)
    optimizer.step_clipped(gradient_norm(model.parameters()), 1.0, torch.tensor(0.0))
    assert all(not torch.equal(a, b) for a, b in zip(before, state(), strict=True))
    assert all(tensor.isfinite().all() for tensor in state())


def test_small_updates_of_bf16_weights_are_not_lost() -> None:
    """An update of 0.2 * 1e-3 on average is a twentieth of the last bit of weights of 1, downwards; 60 make 0.012."""
    model = make_model(torch.bfloat16, torch.bfloat16)
    weight = model.transformer.h[0].attn.proj.weight
    weight.data.fill_(1.0)
    optimizer = make_optimizer(model, OptimizerSettings(optimizer="muon", learning_rate=1e-3), compiled=False)
    generator = torch.Generator().manual_seed(1)
    direction = torch.linalg.qr(torch.randn(64, 64, generator=generator))[0]
    for _ in range(60):
        for other in model.parameters():
            other.grad = torch.zeros_like(other)
        weight.grad = direction.bfloat16().contiguous()
        optimizer.step_clipped(torch.tensor(1.0), 0.0, torch.tensor(0.0))
    moved = in_fp64(1 - weight).reshape(-1)
    decay = 1 - (1 - 1e-4) ** 60
    wanted = 60e-3 * 0.2 * 8 * in_fp64(direction).reshape(-1) + decay
    assert np.polyfit(wanted, moved, 1)[0] == pytest.approx(1.0, abs=0.15)
    assert moved.mean() == pytest.approx(wanted.mean(), abs=2e-4)


def test_batches_of_any_size_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """One matrix at a time, or all of a shape together."""
    found = []
    for numbers in (1, 2 * 96 * 64, 1 << 26):
        monkeypatch.setattr(muon, "BATCH_NUMBERS", numbers)
        model = make_model()
        optimizer = make_optimizer(model, MUON, compiled=False)
        assert isinstance(optimizer, Muon)
        found.append((len(optimizer._rounds), model))
        for step in range(2):
            set_gradients(model, step)
            optimizer.step_clipped(gradient_norm(model.parameters()), 1.0, torch.tensor(0.0))
    assert [rounds for rounds, _ in found] == [14, 6, 4]  # shapes: 4 of (64, 64), (32, 64) and (96, 64); 2 of (64, 96)
    for _, model in found[1:]:
        for ours, theirs in zip(model.parameters(), found[0][1].parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_compiled_it_is_the_same_function() -> None:
    """One graph a size of a part, none for another learning rate, for both kernels."""
    torch._dynamo.reset()
    models = [make_model(torch.bfloat16, torch.bfloat16) for _ in range(2)]
    graphs = 0

    def backend(module: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        nonlocal graphs
        graphs += 1
        return module

    optimizers = [make_optimizer(model, MUON, compiled=False) for model in models]
    compiled = optimizers[0]
    assert isinstance(compiled, Muon)
    for name in ("_momentum_step", "_weight_step"):
        whole = getattr(compiled, name)
        setattr(compiled, name, torch.compile(whole, backend=backend, fullgraph=True, dynamic=False))
    for step, rate in enumerate((1e-2, 2e-2, 3e-2)):
        for model, optimizer in zip(models, optimizers, strict=True):
            set_gradients(model, step)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step_clipped(gradient_norm(model.parameters()), 1.0, torch.tensor(0.0))
    assert graphs == 2 * 3  # of 32 x 64, 64 x 64, 96 x 64
    for ours, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (dict(muon_momentum=0.9), "--muon_momentum 0.9 with --optimizer adamw: only muon has it"),
        (dict(muon_cautious_weight_decay=True), "--muon_cautious_weight_decay True with --optimizer adamw"),
        (dict(optimizer="muon", muon_momentum=1.0), r"--muon_momentum 1.0: must lie in \[0, 1\)"),
    ],
)
def test_bad_settings(flags: dict[str, object], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        Settings(train_data_dir="x", **flags).check()  # type: ignore[arg-type]


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_goes_on_exactly_from_a_checkpoint(tmp_path: Path, dtype: torch.dtype, full: bool) -> None:
    """Four updates at once, or two of them and two after a load: the same bits of weights and state."""
    model = make_model(dtype, torch.bfloat16)
    optimizer = make_optimizer(model, MUON, compiled=False)

    def update(model: GPT, optimizer: AdamW, step: int) -> None:
        set_gradients(model, step)
        optimizer.step_clipped(gradient_norm(model.parameters()), 1.0, torch.tensor(0.0))

    for step in range(2):
        update(model, optimizer, step)
    saver = CheckpointSaver(tmp_path, model, optimizer, full=full, overlap=False, keep_last=0)
    saver.save({"step": 2, "slot": 16, "tokens": 120, "settings": asdict(MUON)})
    saver.close()
    other = GPT(model.config, compute_dtype=torch.bfloat16).to(dtype)
    other_optimizer = make_optimizer(other, replace(MUON, muon_momentum=0.5), compiled=False)
    saved = verified(tmp_path / "iter-00000002-ckpt.pth")
    load(saved, other, other_optimizer)
    assert other_optimizer.param_groups[0]["momentum"] == 0.5  # the settings of now
    other_optimizer.param_groups[0]["momentum"] = 0.95
    for step in (2, 3):
        update(model, optimizer, step)
        update(other, other_optimizer, step)
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        assert optimizer.state[ours].keys() == other_optimizer.state[theirs].keys()
        assert all(
            torch.equal(value, other_optimizer.state[theirs][key]) for key, value in optimizer.state[ours].items()
        )
    require_same_optimizer(saved, MUON)
    with pytest.raises(BadInput, match=r"trained by muon, whose state adamw cannot take\. Go on with --optimizer muon"):
        require_same_optimizer(saved, OptimizerSettings())
    of_before = saved._replace(facts=saved.facts | {"settings": {"learning_rate": 1e-3}})
    require_same_optimizer(of_before, OptimizerSettings())
    with pytest.raises(BadInput, match="was trained by adamw"):
        require_same_optimizer(of_before, MUON)
    imported = saved._replace(facts=saved.facts | {"settings": {}})
    require_same_optimizer(imported, MUON)
