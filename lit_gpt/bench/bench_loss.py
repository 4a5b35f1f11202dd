"""The fused loss beside other implementations of it; what scripts/benchmark_loss.py prints."""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_gpt.bench.timing import device_seconds
from lit_gpt.model import loss as ours

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
CHUNKS = (ours.CHUNK_TOKENS, 4096, 2048)


def measure(tokens: int, width: int, vocabulary: int, dtype: str, repetitions: int) -> Iterator[dict[str, Any]]:
    """A dictionary for each implementation, ours first; `ratio`: our time over its. One not installed says so."""
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(tokens, width, device="cuda", generator=generator).bfloat16().requires_grad_()
    weight = torch.randn(vocabulary, width, device="cuda", generator=generator) * 0.02
    weight = weight.to(getattr(torch, dtype)).requires_grad_()
    targets = torch.randint(0, vocabulary, (tokens,), device="cuda", generator=generator)
    wanted = gradients(lambda x, w, t: F.cross_entropy(x.float() @ w.float().T, t, reduction="sum"), x, weight, targets)
    first = 0.0
    for name, loss in candidates():
        if loss is None:
            yield {"what": name, "skipped": f"not installed: pip install {name}"}
            continue
        line = {"what": name, **timed(loss, x, weight, targets, wanted, repetitions)}
        first = first or line["value"]
        yield line | {"ratio": round(first / line["value"], 3)}


def candidates() -> Iterator[tuple[str, Loss | None]]:
    """Every implementation, ours first; None for one that is not installed.

    Cut-cross-entropy skips blocks of gradients that are below a threshold in bf16; with logits like these, or a new
    model's, that is all but the targets' own. It is measured with and without skipping.
    """
    compiled = torch.compile(ours.cross_entropy)
    for chunk in CHUNKS:
        ours.CHUNK_TOKENS = chunk
        yield f"ours, {chunk} tokens a chunk", lambda x, w, t: ours.linear_cross_entropy(x, w, t, compiled)
    whole = torch.compile(lambda x, w, t: F.cross_entropy((x @ w.to(x.dtype).T).float(), t, reduction="sum"))
    yield "whole logits, compiled", whole
    if importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss(reduction="sum")
        yield "liger-kernel", lambda x, w, t: liger(w.to(x.dtype), x, t)
    else:
        yield "liger-kernel", None
    if importlib.util.find_spec("cut_cross_entropy"):
        from cut_cross_entropy import linear_cross_entropy

        def cut(x: Tensor, w: Tensor, t: Tensor, filter_eps: str | None) -> Tensor:
            return linear_cross_entropy(x, w.to(x.dtype), t, reduction="sum", filter_eps=filter_eps)

        yield "cut-cross-entropy", partial(cut, filter_eps="high")
        yield "cut-cross-entropy, all gradients", partial(cut, filter_eps=None)
    else:
        yield "cut-cross-entropy", None


def gradients(loss: Loss, x: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    value = loss(x, weight, targets)
    return (value.detach(), *torch.autograd.grad(value, (x, weight)))


def timed(
    loss: Loss, x: Tensor, weight: Tensor, targets: Tensor, wanted: tuple[Tensor, ...], repetitions: int
) -> dict[str, Any]:
    found = gradients(loss, x, weight, targets)
    errors = [((a.float() - b.float()).norm() / b.float().norm()).item() for a, b in zip(found, wanted, strict=True)]
    del found
    for _ in range(3):
        gradients(loss, x, weight, targets)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    seconds = device_seconds(lambda: gradients(loss, x, weight, targets), x.device, repetitions)
    memory = (torch.cuda.max_memory_allocated() - before) / 2**30
    return {
        "value": round(statistics.median(seconds) * 1e3, 2),
        "unit": "ms",
        "memory_gib": round(memory, 2),
        "error": [float(f"{e:.1e}") for e in errors],
    }
