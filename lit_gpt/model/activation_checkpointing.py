"""Activation checkpointing: what a block keeps for its backward pass, and what it recomputes.

    none       torch.compile decides: it keeps the output of every GEMM and what is cheap to keep
    selective  keeps the outputs of GEMMs and of attention; recomputes norms, rotary positions, SwiGLU and casts, which
               costs a read and a write of each result. About two thirds stays (memory_plan.py counts)
    full       keeps the block's input only; the forward pass runs twice, a third more arithmetic

Replaces `block.forward` in place: PyTorch's wrapper module would rename the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

_KEPT = (
    "mm", "addmm", "bmm", "fused_mlp", "add_matmul", "_scaled_mm", "float8_amax", "gated_amax",
    "varlen_attention", "_varlen_attn", "_scaled_dot_product",
)  # fmt: skip
"""`selective` keeps the results of operators whose names, without the namespace, begin so."""


def checkpoint_activations(block: nn.Module, kind: str) -> None:
    """Make `block` recompute as `kind` says. Call it before the block is compiled and before it is sharded."""
    if kind != "none":
        block.forward = _recomputed(block.forward, _KEPT if kind == "selective" else ())


def _recomputed(forward: Callable[..., Tensor], kept: tuple[str, ...]) -> Callable[..., Tensor]:
    # A function of this module: torch.compile skips frames that are entered through PyTorch's own `checkpoint`.
    # A policy even where it keeps nothing: without one, torch.compile of torch 2.11 keeps what autograd.Functions save.
    contexts = partial(create_selective_checkpoint_contexts, partial(_policy, kept))

    def run(*inputs: Any) -> Tensor:
        return checkpoint(forward, *inputs, use_reentrant=False, context_fn=contexts)

    return run


def _policy(kept: tuple[str, ...], context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name = operator.name().split("::")[-1].split(".")[0]
    return CheckpointPolicy.MUST_SAVE if name.startswith(kept) else CheckpointPolicy.PREFER_RECOMPUTE
