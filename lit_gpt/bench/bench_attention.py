"""Attention alone, forward and backward, by backend and shape; what scripts/benchmark_attention.py prints.

Each backend is called as the model calls it (attention.py), on packed documents and on rows of one document each.
Times are medians by the device's clock, after a warm-up, of calls that follow each other without a wait. Rates
count the operations inside segments only: two GEMMs forward and five backward over half of each square.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lit_gpt.bench.bench_step import packed_documents
from lit_gpt.bench.timing import device_seconds
from lit_gpt.cli import BadInput
from lit_gpt.config import Config
from lit_gpt.data.loader import full_rows
from lit_gpt.model.attention import BACKENDS, attention, choose_backend, make_segments

# Shapes: B rows, T tokens a row, H query heads, G key-value heads, D head size.

WARMUP = 5
REFERENCE_ROWS = 2
"""Rows of the batch that are compared with fp32, whose mask and scores take B x H x T x T numbers."""
LAYOUTS = ("documents", "whole rows")
RESULTS = ("out", "dq", "dk", "dv")


def measure(
    config: Config, device: torch.device, *, rows: int, requested: str, repetitions: int, seed: int = 0
) -> Iterator[dict[str, Any]]:
    """A dictionary for each layout and backend, or one that says why a backend cannot run here."""
    runnable = []
    for backend in BACKENDS if requested == "all" else (requested,):
        try:
            runnable.append(choose_backend(backend, device, torch.bfloat16))
        except BadInput as error:
            if requested != "all":
                raise
            yield {"what": "attention", "size": config.name, "backend": backend, "skipped": str(error)}
    generator = torch.Generator(device).manual_seed(seed)
    heads = (config.n_head, config.n_query_groups, config.n_query_groups, config.n_head)
    q, k, v, d_out = (
        torch.randn(rows, config.block_size, n, config.head_size, device=device, generator=generator).bfloat16()
        for n in heads
    )
    packed, _ = packed_documents(rows, config.block_size, np.random.default_rng(seed))
    for layout, cu_seqlens in zip(LAYOUTS, (packed, full_rows(rows, config.block_size)), strict=True):
        lengths = np.diff(cu_seqlens.numpy()).astype(np.float64)
        flops = 7 * config.n_embd * float((lengths**2).sum())
        line: dict[str, Any] = {"what": "attention", "size": config.name, "layout": layout, "rows": rows}
        line |= {"segments": int((lengths > 0).sum())}
        wanted = reference(q, k, v, d_out, cu_seqlens)
        for backend in runnable:
            call = Call(q, k, v, cu_seqlens.to(device), backend)
            errors = {name: relative(a, b) for name, a, b in zip(RESULTS, call.results(d_out), wanted, strict=True)}
            ms = milliseconds(partial(call.forward_backward, d_out), device, repetitions)
            forward_ms = milliseconds(call.forward, device, repetitions)
            yield line | {
                "backend": backend, "value": round(ms, 3), "unit": "ms forward and backward",
                "forward_ms": round(forward_ms, 3), "tflops": float(f"{flops / ms / 1e9:.4g}"), "error": errors,
            }  # fmt: skip


class Call:
    """One backend on one batch."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, backend: str) -> None:
        self.inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        self.segments = make_segments(cu_seqlens, q.shape[0], q.shape[1], q.device, q.dtype, backend)
        self.backend = backend

    def forward(self) -> Tensor:
        q, k, v = self.inputs
        return attention(q, k, v, self.segments, self.backend)

    def forward_backward(self, d_out: Tensor) -> tuple[Tensor, ...]:
        """Output and the gradients of q, k and v."""
        out = self.forward()
        return (out, *torch.autograd.grad(out, self.inputs, d_out))

    def results(self, d_out: Tensor) -> list[Tensor]:
        """The first REFERENCE_ROWS rows of what forward_backward gives: no segment reaches into another row."""
        return [x[:REFERENCE_ROWS].detach() for x in self.forward_backward(d_out)]


def reference(q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, cu_seqlens: Tensor) -> list[Tensor]:
    """The results in fp32, by SDPA with a mask, of the first REFERENCE_ROWS rows."""
    rows = min(REFERENCE_ROWS, q.shape[0])
    end = rows * q.shape[1]
    cu_seqlens = cu_seqlens.clamp(max=end).to(q.device)
    call = Call(q[:rows].float(), k[:rows].float(), v[:rows].float(), cu_seqlens, "torch")
    assert call.segments.mask is not None
    return call.results(d_out[:rows].float())


def relative(got: Tensor, wanted: Tensor) -> float:
    """Norm of the difference over the norm of `wanted`, to two digits."""
    return float(f"{((got.float() - wanted).norm() / wanted.norm()).item():.1e}")


def milliseconds(call: Callable[[], Any], device: torch.device, repetitions: int) -> float:
    """Median of `repetitions` calls after WARMUP others."""
    return statistics.median(device_seconds(call, device, repetitions, warmup=WARMUP)) * 1e3
