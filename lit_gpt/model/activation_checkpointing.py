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
    "mm", "addmm", "bmm", "fused_mlp", "add_product", "_scaled_mm", "float8_amax", "gated_amax",
    "varlen_attention", "_varlen_attn", "_scaled_dot_product",
)  # fmt: skip
"""How the names of operators begin, without namespace, whose results `selective` keeps."""


def checkpoint_activations(block: nn.Module, kind: str) -> None:
    """Make `block` recompute by `kind`; before it is compiled, and before it is sharded."""
    if kind != "none":
        block.forward = _recomputed(block.forward, _KEPT if kind == "selective" else ())


def _recomputed(forward: Callable[..., Tensor], kept: tuple[str, ...]) -> Callable[..., Tensor]:
    # A function of this module, since torch.compile leaves out whatever is entered through PyTorch's own `checkpoint`.
    # A policy also where nothing is kept: without one, torch.compile of torch 2.11 keeps what autograd.Functions save.
    contexts = partial(create_selective_checkpoint_contexts, partial(_policy, kept))

    def run(*inputs: Any) -> Tensor:
        return checkpoint(forward, *inputs, use_reentrant=False, context_fn=contexts)

    return run


def _policy(kept: tuple[str, ...], context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name = operator.name().split("::")[-1].split(".")[0]
    return CheckpointPolicy.MUST_SAVE if name.startswith(kept) else CheckpointPolicy.PREFER_RECOMPUTE
