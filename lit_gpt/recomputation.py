"""Activation checkpointing: what a block keeps for its backward pass, and what it computes again.

    none       torch.compile decides: every product of matrices and what is cheap to keep
    selective  products of matrices and attention are kept; norms, rotations, SwiGLU and casts are computed again, which
               costs a read and a write of what they make; about two thirds is kept (memory_plan.py counts)
    full       only the block's input is kept; the forward pass runs twice, a third more arithmetic

In place on `block.forward`, unlike PyTorch's wrapper, which would rename the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

_KEPT = (
    "mm", "addmm", "bmm", "fused_mlp", "add_product", "_scaled_mm", "absolute_max", "gated_absolute_max",
    "varlen_attention", "_varlen_attn", "_scaled_dot_product",
)  # fmt: skip
"""Operators whose results `selective` keeps, by name without namespace; the last stands for all of SDPA's kernels."""


def checkpoint_activations(block: nn.Module, kind: str) -> None:
    """Make `block` recompute by `kind`; before it is compiled, and before it is sharded."""
    if kind == "none":
        return
    contexts = {"context_fn": _selective} if kind == "selective" else {}
    block.forward = _recomputed(block.forward, contexts)


def _recomputed(forward: Callable[..., Tensor], contexts: dict[str, Any]) -> Callable[..., Tensor]:
    # A function of this module, since torch.compile leaves out whatever is entered through PyTorch's own `checkpoint`.
    def run(*inputs: Any) -> Tensor:
        return checkpoint(forward, *inputs, use_reentrant=False, **contexts)

    return run


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name = operator.name().split("::")[-1].split(".")[0]
    kept = name in _KEPT or name.startswith(_KEPT[-1])
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


_selective = partial(create_selective_checkpoint_contexts, _policy)
