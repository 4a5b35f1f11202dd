"""The training loss: the sum of cross-entropy over valid targets, fused with the output projection.

A sum, not a mean: the training loop divides by the number of valid targets of the whole step, over all ranks and
micro-batches. So every token weighs the same, however rows are packed and batches are cut.

Logits of all rows would be the largest tensor of a step (16 rows x 2048 x 32,064 in fp32: 4.2 GB). Here they exist for
CHUNK_TOKENS tokens at a time: the forward pass computes a chunk's loss and at once its gradients, so nothing of size
tokens x vocabulary is kept. torch.compile makes softmax, loss and gradient one kernel, which reads a chunk's logits
from memory once. Cost: the gradient of the weight is accumulated in fp32 (one more tensor of vocabulary x width).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lit_gpt.config import IGNORE_INDEX

# Shapes: N tokens, n tokens of a chunk, C width, V padded vocabulary.

CHUNK_TOKENS = 8192
"""Enough for GEMMs at their full rate; a chunk's logits take 525 MB in bf16."""

CrossEntropy = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over valid targets of -log softmax(logits)[target] in nats, fp32, and its gradient in the logits' type.

    logits (n, V), targets (n,) int64 with IGNORE_INDEX; all arithmetic is fp32. To be compiled.
    """
    valid = (targets != IGNORE_INDEX).unsqueeze(1)  # (n, 1)
    target = targets.clamp(min=0).unsqueeze(1)
    scores = logits.float()
    log_total = scores.logsumexp(dim=1, keepdim=True)
    loss = ((log_total - scores.gather(1, target)) * valid).sum()
    is_target = torch.arange(logits.shape[1], device=logits.device) == target  # (n, V)
    d_logits = ((scores - log_total).exp() - is_target.float()) * valid
    return loss, d_logits.to(logits.dtype)


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, chunk_loss: CrossEntropy = cross_entropy
) -> Tensor:
    """`cross_entropy` of x @ weight.T, a fp32 scalar, without logits of all tokens.

    x (N, C) and weight (V, C) floating point, weight cast to x's type; targets (N,) int64 with IGNORE_INDEX.
    chunk_loss: `cross_entropy`, or what torch.compile made of it.
    """
    return _LinearCrossEntropy.apply(x, weight, targets, chunk_loss)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor, chunk_loss: CrossEntropy) -> Tensor:  # type: ignore[no-untyped-def]
        w = weight.to(x.dtype)
        needs_dx, needs_dw = ctx.needs_input_grad[:2]
        dx = torch.empty_like(x) if needs_dx else None
        dw = torch.zeros_like(weight, dtype=torch.float32) if needs_dw else None
        loss = torch.zeros((), dtype=torch.float32, device=x.device)
        for start in range(0, x.shape[0], CHUNK_TOKENS):
            chunk = slice(start, start + CHUNK_TOKENS)
            chunk_sum, d_logits = chunk_loss(x[chunk] @ w.T, targets[chunk])
            loss += chunk_sum
            if dx is not None:
                torch.mm(d_logits, w, out=dx[chunk])
            if dw is not None:
                _add_matmul(dw, d_logits.T, x[chunk])
        ctx.save_for_backward(dx, dw)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx, d_loss: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:  # type: ignore[no-untyped-def]
        dx, dw = ctx.saved_tensors
        if dx is not None:
            for chunk in dx.split(CHUNK_TOKENS):  # in fp32: bf16 would round the factor of all below the head
                chunk.copy_(chunk.float() * d_loss)
        return (
            dx,
            None if dw is None else (dw * d_loss).to(ctx.weight_dtype),
            None,
            None,
        )


def _add_matmul(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, total in fp32. On a GPU a product of 16-bit operands is accumulated in fp32, without rounding."""
    if total.is_cuda and a.dtype != torch.float32:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total += a @ b
