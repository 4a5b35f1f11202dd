"""Attention: the torch backend, compared with the formula in fp32; the others, through stand-ins for the packages."""

from __future__ import annotations

import itertools
import re
import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_gpt.cli import BadInput
from lit_gpt.model.attention import _trial as TRIAL
from lit_gpt.model.attention import attention, choose_backend, make_segments

CPU = torch.device("cpu")


def plain_attention(q: Tensor, k: Tensor, v: Tensor, spans: list[tuple[int, int]]) -> Tensor:
    """q (N, H, D), k and v (N, G, D), one document after another, in the words of the definition."""
    per_group = q.shape[1] // k.shape[1]
    out = torch.empty_like(q)
    for start, end in spans:
        for head in range(q.shape[1]):
            keys, values = k[start:end, head // per_group], v[start:end, head // per_group]
            scores = q[start:end, head] @ keys.T / q.shape[-1] ** 0.5
            scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), float("-inf"))
            out[start:end, head] = scores.softmax(-1) @ values
    return out


def random_qkv(rows: int, tokens: int, heads: int, groups: int, size: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(rows, tokens, n, size, generator=generator) for n in (heads, groups, groups)]


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 2), (4, 1)])
@pytest.mark.parametrize("packed", [False, True])
def test_torch_backend(heads: int, groups: int, packed: bool) -> None:
    q, k, v = (x.requires_grad_() for x in random_qkv(2, 24, heads, groups, 16))
    spans = [(0, 7), (7, 24), (24, 25), (25, 48)] if packed else [(0, 24), (24, 48)]
    cu_seqlens = torch.tensor([0, *(end for _, end in spans), 48], dtype=torch.int32) if packed else None
    segments = make_segments(cu_seqlens, 2, 24, CPU, torch.float32, "torch")
    out = attention(q, k, v, segments, "torch")
    expected = plain_attention(*(x.flatten(0, 1) for x in (q, k, v)), spans).view_as(q)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    for got, wanted in zip(
        torch.autograd.grad((out * weights).sum(), (q, k, v)),
        torch.autograd.grad((expected * weights).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_positions_restart_at_each_segment() -> None:
    cu_seqlens = torch.tensor([0, 2, 5, 8, 10, 10], dtype=torch.int32)
    segments = make_segments(cu_seqlens, 2, 5, CPU, torch.float32, "torch")
    assert segments.positions.tolist() == [[0, 1, 0, 1, 2], [0, 1, 2, 0, 1]]
    assert segments.max_seqlen == 5


def test_choice() -> None:
    assert choose_backend("auto", CPU, torch.bfloat16) == choose_backend("torch", CPU, torch.bfloat16) == "torch"
    with pytest.raises(BadInput, match=r"unknown attention 'fa1'.*fa3, fa4, fa2, xformers, torch"):
        choose_backend("fa1", CPU, torch.bfloat16)
    for name in ("fa3", "fa4", "fa2", "xformers"):
        with pytest.raises(BadInput, match=f"--attention {name} cannot run here: it needs a CUDA device"):
            choose_backend(name, CPU, torch.bfloat16)


class Hopper:
    """A device of compute capability 9.0, as far as choose_backend looks."""

    type = "cuda"


@pytest.fixture
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> Any:
    """On which every kernel that imports computes what it should."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr("lit_gpt.model.attention._trial", lambda *_: None)
    return Hopper()


def test_auto_takes_the_best_installed(on_hopper: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("flash_attn_interface", "flash_attn.flash_attn_interface", "flash_attn.cute"):
        monkeypatch.setitem(sys.modules, module, None)  # an import of it fails
    assert choose_backend("auto", on_hopper, torch.bfloat16) == "torch"
    with pytest.raises(
        BadInput, match=r"--attention fa3 cannot run here: flash_attn_interface.*Install FlashAttention 3"
    ):
        choose_backend("fa3", on_hopper, torch.bfloat16)
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", types.ModuleType("flash_attn"))
    assert choose_backend("auto", on_hopper, torch.bfloat16) == "fa2"
    monkeypatch.setitem(sys.modules, "flash_attn_interface", types.ModuleType("flash_attn_interface"))
    assert choose_backend("auto", on_hopper, torch.bfloat16) == "fa3"


def test_in_fp32_no_flash_attention(on_hopper: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("flash_attn_interface", "flash_attn.flash_attn_interface", "flash_attn.cute"):
        monkeypatch.setitem(sys.modules, module, types.ModuleType(module))
    assert choose_backend("auto", on_hopper, torch.bfloat16) == "fa4"
    assert choose_backend("auto", on_hopper, torch.float32) == "torch"
    with pytest.raises(BadInput, match=r"--attention fa4 cannot run here: it computes in 16 bits, .*; use torch"):
        choose_backend("fa4", on_hopper, torch.float32)


def from_cu_seqlens(cu_seqlens: Tensor) -> list[tuple[int, int]]:
    edges = cu_seqlens.tolist()
    return [(start, end) for start, end in itertools.pairwise(edges) if end > start]


def forward_with_lse(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    return plain_attention(q, k, v, from_cu_seqlens(cu_seqlens)), torch.zeros(q.shape[1], q.shape[0])


def gradients(d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, ...]:
    """By hand, since there is no autograd inside an operator: dS = P (dP - rowsum(dP P))."""
    scale, per_group = q.shape[-1] ** -0.5, q.shape[1] // k.shape[1]
    dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
    for start, end in from_cu_seqlens(cu_seqlens):
        for head in range(q.shape[1]):
            at, group = slice(start, end), head // per_group
            scores = q[at, head] @ k[at, group].T * scale
            p = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), float("-inf")).softmax(-1)
            dp = d_out[at, head] @ v[at, group].T
            ds = p * (dp - (dp * p).sum(-1, keepdim=True)) * scale
            dq[at, head] = ds @ k[at, group]
            dk[at, group] += ds.T @ q[at, head]
            dv[at, group] += p.T @ d_out[at, head]
    return dq, dk, dv


def fake_fa3() -> types.ModuleType:
    """flash_attn_interface's two low-level functions, with the parameters that its source has (hopper/)."""
    module = types.ModuleType("flash_attn_interface")

    def _flash_attn_forward(
        q, k, v, k_new=None, v_new=None, qv=None, out_=None, cu_seqlens_q=None, cu_seqlens_k=None,
        cu_seqlens_k_new=None, seqused_q=None, seqused_k=None, max_seqlen_q=None, max_seqlen_k=None, page_table=None,
        kv_batch_idx=None, leftpad_k=None, rotary_cos=None, rotary_sin=None, seqlens_rotary=None, q_descale=None,
        k_descale=None, v_descale=None, softmax_scale=None, causal=False, window_size_left=-1, window_size_right=-1,
        attention_chunk=0, softcap=0.0, rotary_interleaved=True, scheduler_metadata=None, num_splits=1, pack_gqa=None,
        sm_margin=0,
    ):  # fmt: skip
        assert causal
        assert softmax_scale == pytest.approx(q.shape[-1] ** -0.5)
        assert max_seqlen_q == max_seqlen_k >= int(cu_seqlens_q.diff().max())
        empty = torch.empty(0)
        return (*forward_with_lse(q, k, v, cu_seqlens_k), empty, empty)

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, sequed_q=None, sequed_k=None,
        max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None, softmax_scale=None, is_causal=False,
        window_size_left=-1, window_size_right=-1, softcap=0.0, deterministic=False, sm_margin=0,
    ):  # fmt: skip
        assert is_causal
        assert softmax_lse.shape == (q.shape[1], q.shape[0])
        assert softmax_scale == pytest.approx(q.shape[-1] ** -0.5)
        for into, gradient in zip((dq, dk, dv), gradients(dout, q, k, v, cu_seqlens_q), strict=True):
            into.copy_(gradient)
        return torch.empty(0)

    module._flash_attn_forward, module._flash_attn_backward = _flash_attn_forward, _flash_attn_backward
    return module


def fake_fa2() -> types.ModuleType:
    module = types.ModuleType("flash_attn")

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
        causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
        return_attn_probs=False, block_table=None,
    ):  # fmt: skip
        assert causal
        return plain_attention(q, k, v, from_cu_seqlens(cu_seqlens_q))

    module.flash_attn_varlen_func = flash_attn_varlen_func
    return module


@pytest.mark.parametrize(
    ("backend", "name", "module"),
    [("fa3", "flash_attn_interface", fake_fa3()), ("fa2", "flash_attn.flash_attn_interface", fake_fa2())],
)
def test_calls_of_flash_attention_packages(
    backend: str, name: str, module: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What we pass and what we make of the results, forward and backward, where the packages themselves cannot run."""
    monkeypatch.setitem(sys.modules, name, module)
    q, k, v = (x.requires_grad_() for x in random_qkv(2, 24, 6, 2, 16))
    cu_seqlens = torch.tensor([0, 7, 24, 25, 48, 48], dtype=torch.int32)
    results = []
    for chosen in (backend, "torch"):
        out = attention(q, k, v, make_segments(cu_seqlens, 2, 24, CPU, torch.float32, chosen), chosen)
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        results.append((out, *torch.autograd.grad((out * weights).sum(), (q, k, v))))
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def failing(q: Tensor, *_: Any, **__: Any) -> Tensor:
    raise NotImplementedError("No operator found for\nthis input")


def wrong_by_a_fifth(*args: Any, **options: Any) -> Tensor:
    return fake_fa2().flash_attn_varlen_func(*args, **options) * 1.2


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (failing, "its kernels fail here with torch .*, NotImplementedError: No operator found for this input"),
        (wrong_by_a_fifth, r"its kernels compute wrong values here with torch .* \(relative error 0\.[0-9]+\)"),
    ],
)
def test_kernels_are_tried_before_they_are_chosen(
    function: Any, said: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A package that imports and cannot compute is refused by name, and passed over by auto. Tried on the CPU here."""
    caplog.set_level("INFO")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(
        "lit_gpt.model.attention._trial", lambda backend, _, __, heads: TRIAL(backend, CPU, torch.float32, heads)
    )
    module = fake_fa2()
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", module)
    monkeypatch.setitem(sys.modules, "flash_attn.cute", None)
    before = torch.get_rng_state()
    assert choose_backend("auto", Hopper(), torch.bfloat16, (6, 2, 16)) == "fa2"
    module.flash_attn_varlen_func = function
    assert choose_backend("auto", Hopper(), torch.bfloat16, (6, 2, 16)) == "torch"
    assert re.search(f"attention: not fa2: {said}", caplog.text)
    with pytest.raises(BadInput, match=f"--attention fa2 cannot run here: {said}.*Install a build of fa2 for"):
        choose_backend("fa2", Hopper(), torch.bfloat16, (6, 2, 16))
    assert torch.equal(torch.get_rng_state(), before)


def asked(called: list[bool], backend: str) -> types.ModuleType:
    """A package whose backward pass notes whether it was asked to be deterministic; signatures as of their sources."""

    def forward(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(q), torch.zeros(q.shape[1], q.shape[0])

    def backward(*_: Any, deterministic: bool = False, **__: Any) -> None:
        called.append(deterministic)

    def whole(q: Tensor, *_: Any, deterministic: bool = False, **__: Any) -> Tensor:
        called.append(deterministic)
        return q.clone()

    module = types.ModuleType(backend)
    module._flash_attn_forward, module._flash_attn_backward = forward, backward
    module.flash_attn_varlen_func = whole
    module.interface = types.SimpleNamespace(_flash_attn_fwd=forward, _flash_attn_bwd=backward)
    return module


@pytest.fixture
def deterministic() -> Any:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("backend", ["fa2", "fa3", "fa4"])
def test_kernels_are_asked_to_be_deterministic(
    backend: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    called: list[bool] = []
    monkeypatch.setattr("lit_gpt.model.attention._package", lambda name: asked(called, name))
    cu_seqlens = torch.tensor([0, 24, 48], dtype=torch.int32)
    for wanted in (False, True):
        if wanted:
            request.getfixturevalue("deterministic")
        q, k, v = (x.requires_grad_() for x in random_qkv(2, 24, 6, 2, 16))
        segments = make_segments(cu_seqlens, 2, 24, CPU, torch.float32, backend)
        attention(q, k, v, segments, backend).sum().backward()
        assert called.pop() is wanted
        assert not called


@pytest.mark.usefixtures("deterministic")
def test_backends_without_determinism_are_refused(on_hopper: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xformers.ops", types.ModuleType("xformers.ops"))
    with pytest.raises(
        BadInput, match=r"--attention xformers cannot run here: .*--deterministic; use fa3, fa2 or torch"
    ):
        choose_backend("xformers", on_hopper, torch.bfloat16)
    assert choose_backend("torch", on_hopper, torch.bfloat16) == "torch"


def test_custom_operator_is_sound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Schema, fake implementation and autograd registration agree with what the operator does."""
    monkeypatch.setitem(sys.modules, "flash_attn_interface", fake_fa3())
    q, k, v = (x.flatten(0, 1).requires_grad_() for x in random_qkv(1, 12, 4, 2, 8))
    cu_seqlens = torch.tensor([0, 5, 12], dtype=torch.int32)
    torch.library.opcheck(torch.ops.llammlein.varlen_attention.default, (q, k, v, cu_seqlens, 12, "fa3"))
