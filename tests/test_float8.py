"""Float8 linears on a CPU, where torchao multiplies 8-bit numbers in full precision."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import nn

from lit_gpt.args import Settings
from lit_gpt.cli import BadInput
from lit_gpt.config import Config
from lit_gpt.float8 import use_float8
from lit_gpt.model import GPT, initialize

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


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_agrees_with_fp32_on_the_same_rows(recipe: str) -> None:
    """e4m3 has 3 bits after the point, so a number is off by 3 % at most; sums over a width average that out."""
    loss, norm = loss_and_norm("none")
    loss_8, norm_8 = loss_and_norm(recipe)
    assert loss_8 != loss
    assert loss_8 == pytest.approx(loss, rel=1e-3)
    assert norm_8 == pytest.approx(norm, rel=0.02)


def test_only_the_blocks_products_are_exchanged() -> None:
    model = GPT(Config.from_name("debug"))
    use_float8(model.transformer.h, "tensorwise", CPU)
    exchanged = {name for name, module in model.named_modules() if type(module).__name__ == "Float8Linear"}
    assert {name.split(".", 3)[-1] for name in exchanged} == {"attn.qkv", "attn.proj", "mlp.gate_up", "mlp.down"}
    assert len(exchanged) == 4 * model.config.n_layer


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadInput, match="0 is 24 x 20, no multiples of 16"):
        use_float8(nn.ModuleList([nn.Linear(20, 24)]), "rowwise", CPU)
    with pytest.raises(
        BadInput, match=r"--float8 rowwise with --precision 32-true. Valid with it: bf16-mixed, bf16-true"
    ):
        Settings(train_data_dir="x", float8="rowwise", precision="32-true").check()

    def missing(name: str) -> Any:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(BadInput, match=r"torchao does not import .*pip install -e '.\[float8\]'"):
        use_float8(nn.ModuleList([nn.Linear(16, 16)]), "rowwise", CPU)
