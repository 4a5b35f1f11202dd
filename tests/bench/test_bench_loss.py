"""What the loss benchmark compares with, where the packages are missing. The measurement itself needs a GPU."""

from __future__ import annotations

import sys

import pytest

from lit_gpt.bench.bench_loss import CHUNKS, candidates
from lit_gpt.model import loss


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """None in sys.modules makes Python refuse a package, as if it were not installed."""
    monkeypatch.setattr(loss, "CHUNK_TOKENS", loss.CHUNK_TOKENS)  # which candidates() sets
    for package in ("liger_kernel", "cut_cross_entropy"):
        monkeypatch.setitem(sys.modules, package, None)
    found = list(candidates())
    assert [name for name, way in found if way is None] == ["liger-kernel", "cut-cross-entropy"]
    assert [name for name, way in found if way] == [
        *(f"ours, {chunk} tokens a chunk" for chunk in CHUNKS), "whole logits, compiled",
    ]  # fmt: skip
