"""Blocks under torch.compile on a CPU: no graph break, one compilation for all, with checkpointing and float8 too."""

from __future__ import annotations

from collections import Counter
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from lit_gpt.config import Config
from lit_gpt.model.activation_checkpointing import checkpoint_activations
from lit_gpt.model.attention import make_segments
from lit_gpt.model.float8 import use_float8
from lit_gpt.model.gpt import GPT, initialize, rotary_angles

KINDS = ("none", "selective", "full")
ROWS, TOKENS = 2, 32
SDPA = ("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_attention_math")


def model(kind: str = "none", float8: str = "none", dtype: torch.dtype = torch.float32) -> GPT:
    made = GPT(Config.from_name("debug", block_size=TOKENS), compute_dtype=dtype)
    initialize(made, seed=1)
    if float8 != "none":
        use_float8(made.transformer.h, float8, torch.device("cpu"))
    for block in made.transformer.h:
        checkpoint_activations(block, kind)
    return made


def losses_and_gradients(made: GPT) -> tuple[Tensor, dict[str, Tensor]]:
    tokens = torch.randint(0, 4096, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    cu_seqlens = torch.tensor([0, 5, 32, 50, 64, 64, 64, 64], dtype=torch.int32)
    loss = made(tokens, cu_seqlens, tokens.roll(-1, 1))
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in made.named_parameters() if p.grad is not None}


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "float8"), list(product(KINDS, ("none", "tensorwise"))))
def test_no_graph_break_and_one_graph_for_all_blocks(kind: str, float8: str) -> None:
    """fullgraph refuses a break; the backend is the plain one: what is tested is the tracing, not the kernels."""
    made = model(kind, float8, torch.bfloat16)
    torch._dynamo.reset()
    counters.clear()
    for block in made.transformer.h:
        block.compile(fullgraph=True, backend="aot_eager")
    losses_and_gradients(made)
    assert len(made.transformer.h) > 1
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS[1:])
def test_recomputation_changes_no_bit(kind: str) -> None:
    wanted_loss, wanted = losses_and_gradients(model())
    loss, gradients = losses_and_gradients(model(kind))
    assert torch.equal(loss, wanted_loss)
    assert gradients.keys() == wanted.keys()
    assert all(torch.equal(gradients[name], wanted[name]) for name in wanted)


class Counted(TorchDispatchMode):
    """Counts the operators that are computed; what checkpointing takes from its store does not arrive here."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[operator.overloadpacket.__name__] += 1
        return operator(*args, **(kwargs or {}))


def test_selective_computes_no_product_and_no_attention_again() -> None:
    """Of a block: 4 products forward, 8 backward. `full` makes all but the last again, whose result nobody needs."""
    calls = {}
    for kind in KINDS:
        made = model(kind)
        x = torch.randn(ROWS, TOKENS, made.config.n_embd, requires_grad=True)
        segments = make_segments(None, ROWS, TOKENS, x.device, x.dtype, "torch")
        cos, sin = rotary_angles(segments.positions, made.config.head_size, made.config.rope_base)
        out = made.transformer.h[0](x, cos, sin, segments, "torch")
        with Counted() as counted:
            out.sum().backward()
        calls[kind] = counted.calls
    assert [calls[kind]["mm"] for kind in KINDS] == [8, 8, 8 + 3]
    attention = [sum(calls[kind][name] for name in SDPA) for kind in KINDS]
    assert attention == [0, 0, 1]
    assert calls["selective"]["silu"] == calls["none"]["silu"] + 1
