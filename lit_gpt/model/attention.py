"""Causal attention over packed documents: one function in FlashAttention's own layout, five backends behind it.

The only importer of flash-attention packages. A backend is chosen once, by `choose_backend`, which tries and logs it; a
backend asked for by name that cannot run here is an error that says what to install. Every backend gives the numbers of
the `torch` one (tests/model/test_attention.py on CPUs, tests/gpu/test_attention.py on a Hopper GPU):

| backend  | package                             | runs                     |
|----------|-------------------------------------|--------------------------|
| fa3      | flash_attn_interface (FlashAttention 3) | Hopper, 16 bits      |
| fa4      | flash_attn.cute (FlashAttention 4)  | Hopper, Blackwell, 16 bits |
| fa2      | flash_attn (FlashAttention 2)       | Ampere and newer, 16 bits |
| xformers | xformers                            | Ampere and newer         |
| torch    | none                                | everywhere: varlen_attn on GPUs in 16 bits, else SDPA with a mask |

fa3 and fa4 are called through one custom operator with its own backward, so that torch.compile keeps a block whole.
Under torch.use_deterministic_algorithms each kernel is asked for its deterministic backward pass (`torch` needs no
asking), and a backend that has none is refused.
"""

from __future__ import annotations

import importlib
import inspect
import logging
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_gpt.cli import BadInput
from lit_gpt.model.kernel_trial import why_kernels_fail

log = logging.getLogger(__name__)

# Shapes: B rows, T tokens a row, H query heads, G key-value heads (query groups), D head size, S segments.

PACKAGES = {
    "fa3": ("flash_attn_interface", "FlashAttention 3: the wheel flash_attn_3 of the PyTorch project's index"),
    "fa4": ("flash_attn.cute", "FlashAttention 4: pip install flash-attn-4"),
    # not the bare flash_attn: FlashAttention 4 makes a namespace package of that name
    "fa2": ("flash_attn.flash_attn_interface", "FlashAttention 2: pip install flash-attn"),
    "xformers": ("xformers.ops", "xformers: pip install xformers"),
}
BACKENDS = (*PACKAGES, "torch")
HALF = (torch.bfloat16, torch.float16)


class Segments(NamedTuple):
    """What attention and positions need to know of a micro-batch's segments; made once a batch, outside the layers."""

    cu_seqlens: Tensor
    """(S + 1,) int32: where each segment starts in the B * T tokens, then B * T; trailing segments may be empty."""
    positions: Tensor
    """(B, T) int32: each token's index in its segment."""
    max_seqlen: int
    """A bound on the segments' length: T. A constant, so that compiled code is not compiled again."""
    mask: Any
    """What the backend wants beside cu_seqlens: (B, 1, T, T) bool for SDPA, xformers' bias, or None."""


def choose_backend(
    requested: str, device: torch.device, dtype: torch.dtype, heads: tuple[int, int, int] = (2, 1, 64)
) -> str:
    """The backend that `requested` ("auto" or a name) stands for on this device, computing in `dtype`.

    heads: H, G and D of the model. Each package's kernels are tried with them before they are chosen: a wheel built for
    another torch or CUDA imports and cannot run. Raises BadInput if a backend asked for by name cannot run.
    """
    if requested not in ("auto", *BACKENDS):
        raise BadInput(f"unknown attention {requested!r}. Valid: auto, {', '.join(BACKENDS)}")
    candidates = _by_preference(device) if requested == "auto" else (requested,)
    for backend in candidates:
        reason = _why_not(backend, device, dtype, heads)
        if reason is None:
            log.info("attention: %s on %s (asked for: %s)", backend, device.type, requested)
            return backend
        if requested != "auto":
            raise BadInput(f"--attention {backend} cannot run here: {reason}")
        log.info("attention: not %s: %s", backend, reason)
    raise AssertionError("torch runs everywhere")


def _by_preference(device: torch.device) -> tuple[str, ...]:
    """Fastest first, as measured (docs/benchmark_log.md); fa2 was not."""
    if device.type != "cuda":
        return ("torch",)
    hopper = torch.cuda.get_device_capability(device)[0] == 9
    return ("fa4", "fa3", "fa2", "torch") if hopper else ("fa4", "fa2", "torch")


def _why_not(backend: str, device: torch.device, dtype: torch.dtype, heads: tuple[int, int, int]) -> str | None:
    """Why `backend` cannot run on this device in this type, in words for a user; None if it can."""
    if backend == "torch":
        return None
    if device.type != "cuda":
        return f"it needs a CUDA device, this run is on {device.type}; use --attention torch"
    major, minor = torch.cuda.get_device_capability(device)
    if major not in {"fa3": (9,), "fa4": (9, 10, 11, 12)}.get(backend, range(8, 13)):
        return f"it has no kernels for compute capability {major}.{minor}"
    if dtype not in HALF and backend != "xformers":
        return f"it computes in 16 bits, this run in {dtype}; use torch"
    if torch.are_deterministic_algorithms_enabled() and (backend == "xformers" or (backend, major) == ("fa4", 12)):
        return "its backward pass here is not --deterministic; use fa3, fa2 or torch"
    module, install = PACKAGES[backend]
    try:
        importlib.import_module(module)
    except ImportError as error:
        return f"{module} does not import ({error}). Install {install}"
    log.info("attention: trying the kernels of %s, which are compiled at their first use", backend)
    why = _trial(backend, device, dtype, heads)
    return None if why is None else f"{why}. Install a build of {backend} for this torch and CUDA, or take another"


def _trial(backend: str, device: torch.device, dtype: torch.dtype, heads: tuple[int, int, int]) -> str | None:
    """Why the kernels fail for two segments, compared with SDPA with a mask; None if they are right."""
    tokens, (queries, groups, size) = 256, heads

    def attend(q: Tensor, k: Tensor, v: Tensor, chosen: str) -> Tensor:
        cu_seqlens = torch.tensor([0, tokens // 4, tokens], dtype=torch.int32, device=q.device)
        return attention(q, k, v, make_segments(cu_seqlens, 1, tokens, q.device, q.dtype, chosen), chosen)

    shapes = [(1, tokens, n, size) for n in (queries, groups, groups)]
    here, plain = (partial(attend, chosen=name) for name in (backend, "torch"))
    return why_kernels_fail(here, plain, shapes, torch.empty(0, device=device, dtype=dtype))


def make_segments(
    cu_seqlens: Tensor | None, rows: int, tokens: int, device: torch.device, dtype: torch.dtype, backend: str
) -> Segments:
    """Segments of a (rows, tokens) batch; cu_seqlens None: each row is one segment. No segment spans two rows."""
    total = rows * tokens
    if cu_seqlens is None:
        cu_seqlens = torch.arange(0, total + 1, tokens, dtype=torch.int32, device=device)
    index = torch.arange(total, dtype=cu_seqlens.dtype, device=device)
    segment = torch.searchsorted(cu_seqlens, index, right=True) - 1  # (B * T,)
    positions = (index - cu_seqlens[segment]).view(rows, tokens)
    mask = None
    if backend == "xformers":
        # xformers wants the lengths on the host: one synchronisation a batch, which the other backends do not need.
        lengths = cu_seqlens.diff()
        mask = _package("xformers").fmha.attn_bias.BlockDiagonalCausalMask.from_seqlens(lengths[lengths > 0].tolist())
    elif backend == "torch" and not (device.type == "cuda" and dtype in HALF):
        segment = segment.view(rows, 1, tokens)
        causal = torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril()
        mask = (segment.unsqueeze(3) == segment.unsqueeze(2)) & causal  # (B, 1, T, T)
    return Segments(cu_seqlens, positions, tokens, mask)


def attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments, backend: str) -> Tensor:
    """softmax(q k^T / sqrt(D), causal inside each segment) v.

    q (B, T, H, D); k, v (B, T, G, D) with G dividing H: key head g serves query heads g * H / G and the following.
    Returns (B, T, H, D).
    """
    if segments.mask is not None and backend == "torch":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, heads, T, D)
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=segments.mask, enable_gqa=grouped).transpose(1, 2)
    shape = q.shape
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))  # (B * T, heads, D)
    cu_seqlens, max_seqlen = segments.cu_seqlens, segments.max_seqlen
    if backend in ("fa3", "fa4"):
        out, _ = torch.ops.llammlein.varlen_attention(q, k, v, cu_seqlens, max_seqlen, backend)
    elif backend == "fa2":
        out = _package("fa2").flash_attn_varlen_func(
            q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen,
            causal=True, deterministic=torch.are_deterministic_algorithms_enabled(),
        )  # fmt: skip
    elif backend == "xformers":
        out = _xformers(q, k, v, segments.mask)
    else:
        out = _torch_varlen(q, k, v, cu_seqlens, max_seqlen)
    return out.view(shape)


def _package(backend: str) -> ModuleType:
    return importlib.import_module(PACKAGES[backend][0])


def _torch_varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    # torch 2.10 says causal by is_causal and takes grouped heads unasked; 2.11 and newer by window_size and enable_gqa.
    accepted = inspect.signature(varlen_attn).parameters
    causal: dict[str, Any] = {"is_causal": True} if "is_causal" in accepted else {"window_size": (-1, 0)}
    if "enable_gqa" in accepted:
        causal["enable_gqa"] = q.shape[1] != k.shape[1]
    out = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, **causal)
    assert isinstance(out, Tensor)  # a pair only when the log-sum-exp is asked for
    return out


def _xformers(q: Tensor, k: Tensor, v: Tensor, bias: Any) -> Tensor:
    per_group = q.shape[1] // k.shape[1]  # xformers takes grouped heads as a fifth dimension, (1, B * T, G, H / G, D)
    q5 = q.unflatten(1, (k.shape[1], per_group)).unsqueeze(0)
    k5, v5 = (x.unsqueeze(2).expand(-1, -1, per_group, -1).unsqueeze(0) for x in (k, v))
    return _package("xformers").memory_efficient_attention(q5, k5, v5, attn_bias=bias).squeeze(0).flatten(1, 2)


@torch.library.custom_op("llammlein::varlen_attention", mutates_args=())
def _varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, backend: str
) -> tuple[Tensor, Tensor]:
    """Output (B * T, H, D) and log-sum-exp (H, B * T) fp32 of causal attention inside each segment."""
    module = _package(backend)
    if backend == "fa3":
        out, lse, *_ = module._flash_attn_forward(
            q, k, v, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, max_seqlen_q=max_seqlen, max_seqlen_k=max_seqlen,
            softmax_scale=q.shape[-1] ** -0.5, causal=True,
        )  # fmt: skip
    else:
        out, lse, *_ = module.interface._flash_attn_fwd(
            q, k, v, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, max_seqlen_q=max_seqlen, max_seqlen_k=max_seqlen,
            causal=True, return_lse=True,
        )  # fmt: skip
    return out, lse


@_varlen_attention.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(
        q.shape[1], q.shape[0], dtype=torch.float32
    )


@torch.library.custom_op("llammlein::varlen_attention_backward", mutates_args=())
def _varlen_attention_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    module = _package(backend)
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    deterministic = torch.are_deterministic_algorithms_enabled()
    if backend == "fa3":
        module._flash_attn_backward(
            d_out, q, k, v, out, lse, cu_seqlens, cu_seqlens, None, None, max_seqlen, max_seqlen, dq, dk, dv,
            q.shape[-1] ** -0.5, True, deterministic=deterministic,
        )  # fmt: skip
    else:
        module.interface._flash_attn_bwd(
            q, k, v, out, d_out, lse, causal=True, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens,
            max_seqlen_q=max_seqlen, max_seqlen_k=max_seqlen, dq=dq, dk=dk, dv=dv, deterministic=deterministic,
        )  # fmt: skip
    return dq, dk, dv


@_varlen_attention_backward.register_fake
def _(d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_seqlens, ctx.max_seqlen, ctx.backend = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, d_out: Tensor, d_lse: None) -> tuple[Tensor | None, ...]:
    grads = _varlen_attention_backward(d_out.contiguous(), *ctx.saved_tensors, ctx.max_seqlen, ctx.backend)
    return (*grads, None, None, None)


_varlen_attention.register_autograd(_backward, setup_context=_save)
