"""The training loss: the sum of cross-entropy over valid targets, fused with the output projection.

A sum, not a mean: the divisor is the number of valid targets of the whole step over all ranks and micro-batches, which
only the training loop knows, so that every token weighs the same however rows are packed and batches are cut.

Logits of all rows would be the largest tensor of a step (16 rows x 2048 x 32,064 in fp32: 4.2 GB). Here they exist for
CHUNK_TOKENS tokens at a time: the forward pass computes a chunk's loss and at once its gradients, so nothing of size
tokens x vocabulary is kept. Cost: the gradient of the weight is accumulated in fp32 (one extra vocabulary x width).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_gpt.config import IGNORE_INDEX

# Shapes: N tokens, C width, V padded vocabulary.

CHUNK_TOKENS = 2048


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Sum over valid targets of -log softmax(x @ weight.T)[target], in nats.

    x (N, C) and weight (V, C) floating point, weight cast to x's type; targets (N,) int64 with IGNORE_INDEX. Returns a
    fp32 scalar. Softmax and its gradient are computed in fp32 from logits of x's type.
    """
    return _LinearCrossEntropy.apply(x, weight, targets)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        w = weight.to(x.dtype)
        needs_dx, needs_dw, _ = ctx.needs_input_grad
        dx = torch.empty_like(x) if needs_dx else None
        dw = torch.zeros_like(weight, dtype=torch.float32) if needs_dw else None
        loss = torch.zeros((), dtype=torch.float32, device=x.device)
        for start in range(0, x.shape[0], CHUNK_TOKENS):
            chunk = slice(start, start + CHUNK_TOKENS)
            log_p = F.log_softmax((x[chunk] @ w.T).float(), dim=-1)  # (n, V)
            loss += F.nll_loss(log_p, targets[chunk], ignore_index=IGNORE_INDEX, reduction="sum")
            if dx is None and dw is None:
                continue
            valid = (targets[chunk] != IGNORE_INDEX).unsqueeze(1)  # (n, 1)
            one_hot_at = targets[chunk].clamp(min=0).unsqueeze(1)
            d_logits = log_p.exp_().scatter_add_(1, one_hot_at, -torch.ones_like(log_p[:, :1])).mul_(valid).to(x.dtype)
            if dx is not None:
                dx[chunk] = d_logits @ w
            if dw is not None:
                dw += d_logits.T @ x[chunk]
        ctx.save_for_backward(dx, dw)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx, d_loss: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # type: ignore[no-untyped-def]
        dx, dw = ctx.saved_tensors
        return (
            None if dx is None else dx * d_loss.to(dx.dtype),
            None if dw is None else (dw * d_loss).to(ctx.weight_dtype),
            None,
        )
