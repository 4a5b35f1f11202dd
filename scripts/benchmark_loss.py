"""Measure the loss with the output projection, forward and backward, against other ways; one JSON object a line.

    python scripts/benchmark_loss.py [--tokens 32768] [--width 2048] [--vocabulary 32064] [--dtype bfloat16]

Ours (lit_gpt/loss.py, compiled, by chunk size) beside whole logits under torch.compile, and the fused losses of
liger-kernel and cut-cross-entropy where these are installed. Needs a GPU. `error` is the relative error of the loss and
of the gradients of input and weight against fp32 on the same numbers.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_gpt import loss as ours
from lit_gpt.cli import BadInput, Parser, run_program

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
CHUNKS = (2048, 4096, 8192)


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=32064)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="of the weight")
    parser.add_argument("--repetitions", type=int, default=15)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise BadInput("scripts/benchmark_loss.py needs a CUDA device, and none is visible")
    generator = torch.Generator("cuda").manual_seed(0)
    shape = (arguments.tokens, arguments.width)
    x = torch.randn(shape, device="cuda", generator=generator).bfloat16().requires_grad_()
    weight = torch.randn(arguments.vocabulary, arguments.width, device="cuda", generator=generator) * 0.02
    weight = weight.to(getattr(torch, arguments.dtype)).requires_grad_()
    targets = torch.randint(0, arguments.vocabulary, shape[:1], device="cuda", generator=generator)
    wanted = gradients(lambda x, w, t: F.cross_entropy(x.float() @ w.float().T, t, reduction="sum"), x, weight, targets)
    first = None
    for name, loss in candidates():
        line = {"what": name, **measure(loss, x, weight, targets, wanted, arguments.repetitions)}
        first = first or line["value"]
        print(json.dumps(line | {"ratio": round(first / line["value"], 3)}), flush=True)


def candidates() -> Iterator[tuple[str, Loss]]:
    """Every way that is installed; ours first."""
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
    if importlib.util.find_spec("cut_cross_entropy"):
        from cut_cross_entropy import linear_cross_entropy

        yield "cut-cross-entropy", lambda x, w, t: linear_cross_entropy(x, w.to(x.dtype), t, reduction="sum")


def gradients(loss: Loss, x: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    value = loss(x, weight, targets)
    return (value.detach(), *torch.autograd.grad(value, (x, weight)))


def measure(
    loss: Loss, x: Tensor, weight: Tensor, targets: Tensor, wanted: tuple[Tensor, ...], repetitions: int
) -> dict[str, object]:
    found = gradients(loss, x, weight, targets)
    errors = [((a.float() - b.float()).norm() / b.float().norm()).item() for a, b in zip(found, wanted, strict=True)]
    del found
    for _ in range(3):
        gradients(loss, x, weight, targets)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    edges = [torch.cuda.Event(enable_timing=True) for _ in range(repetitions + 1)]
    edges[0].record()
    for edge in edges[1:]:
        gradients(loss, x, weight, targets)
        edge.record()
    torch.cuda.synchronize()
    ms = statistics.median(a.elapsed_time(b) for a, b in pairwise(edges))
    memory = (torch.cuda.max_memory_allocated() - before) / 2**30
    return {
        "value": round(ms, 2),
        "unit": "ms",
        "memory_gib": round(memory, 2),
        "error": [float(f"{e:.1e}") for e in errors],
    }


if __name__ == "__main__":
    run_program(main)
