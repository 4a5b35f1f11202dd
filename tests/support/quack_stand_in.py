"""A stand-in for quack-kernels 0.6 in plain PyTorch: the functions that we call, for machines without a Hopper GPU."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lit_gpt.model import fused_mlp
from lit_gpt.model.fused_mlp import PACKAGE


def alternating(halves: Tensor, dim: int) -> Tensor:
    """[a0 a1 ..; b0 b1 ..] along dim to a0 b0 a1 b1 .."""
    return torch.stack(halves.chunk(2, dim=dim), dim=dim + 1).flatten(dim, dim + 1)


def halves(mixed: Tensor, dim: int) -> Tensor:
    return torch.cat([mixed.unflatten(dim, (-1, 2)).select(dim + 1, i) for i in (0, 1)], dim=dim)


def swiglu(mixed: Tensor) -> Tensor:
    return F.silu(mixed[:, 0::2]) * mixed[:, 1::2]


class Quack(ModuleType):
    """concat_layout names the tensors whose halves are concatenated; the kernels' own layout interleaves them."""

    @staticmethod
    def gemm(
        a: Tensor,
        b: Tensor,
        out_dtype: Any = None,
        tuned: bool = True,
        concat_layout: tuple[str, ...] = (),
        dynamic_scheduler: bool = False,
    ) -> Tensor:
        assert not tuned, "tuning measures dozens of kernels at the start of a run"
        out = a.float() @ (alternating(b, 0) if "B" in concat_layout else b).float()
        return (halves(out, 0) if "out" in concat_layout else out).to(out_dtype or a.dtype)

    @staticmethod
    def gemm_add(a: Tensor, b: Tensor, c: Tensor, tuned: bool = True, dynamic_scheduler: bool = False) -> Tensor:
        assert not tuned
        return (a.float() @ b.float() + c.float()).to(a.dtype)

    class gemm_tuned:
        @staticmethod
        def fn(
            a: Tensor,
            b: Tensor,
            out: Tensor,
            *,
            config: Any,
            dynamic_scheduler: bool,
            concat_layout: tuple[str, ...] | None,
        ) -> None:
            Quack.tiles.append((config.tile_m, config.tile_n))
            out.copy_(Quack.gemm(a, b, out.dtype, False, concat_layout or ()))

    tiles: ClassVar[list[tuple[int, int]]] = []

    @staticmethod
    def gemm_gated(
        a: Tensor, b: Tensor, activation: str, tuned: bool = True, concat_layout: tuple[str, ...] = ()
    ) -> tuple[Tensor, Tensor]:
        assert activation == "swiglu"
        assert concat_layout == ("B",)
        assert not tuned
        mixed = a.float() @ alternating(b, 1).float()
        return mixed.to(a.dtype), swiglu(mixed).to(a.dtype)

    @staticmethod
    def gemm_dgated(
        a: Tensor, b: Tensor, mixed: Tensor, activation: str, tuned: bool = True, config: Any = None
    ) -> tuple[Tensor, Tensor]:
        assert activation == "swiglu"
        assert not tuned
        d_inner = a.float() @ b.float()
        gate, up = mixed.float()[:, 0::2], mixed.float()[:, 1::2]
        sigmoid = gate.sigmoid()
        d_gate = d_inner * up * sigmoid * (1 + gate * (1 - sigmoid))
        d_mixed = torch.stack((d_gate, d_inner * gate * sigmoid), dim=2).flatten(1, 2)
        return d_mixed.to(a.dtype), swiglu(mixed.float()).to(a.dtype)


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "quack", ModuleType("quack"))
    monkeypatch.setitem(sys.modules, PACKAGE, Quack(PACKAGE))
    config = ModuleType("quack.gemm_config")
    monkeypatch.setattr(config, "GemmConfig", SimpleNamespace, raising=False)
    monkeypatch.setitem(sys.modules, config.__name__, config)
    monkeypatch.setattr(fused_mlp, "_sm_count", lambda device: 132)
    monkeypatch.setattr(Quack, "tiles", [])
