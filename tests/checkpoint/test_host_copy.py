"""Repeated copies of a training state to host memory."""

from __future__ import annotations

import torch

from lit_gpt.checkpoint.host_copy import HostCopy


def test_a_copy_is_apart_from_its_source_and_its_memory_is_used_again() -> None:
    weight, step = torch.randn(3, 4), torch.tensor(7.0)
    state = {"model": {"w": weight}, "optimizer": {"groups": [{"lr": 0.1, "betas": (0.9, 0.95)}], "step": step}}
    copies = HostCopy(from_gpu=False)
    first = copies.of(state)
    assert torch.equal(first["model"]["w"], weight)
    assert first["optimizer"]["groups"] == state["optimizer"]["groups"]
    address = first["model"]["w"].data_ptr()
    assert address != weight.data_ptr()
    before = weight.clone()
    weight += 1
    step += 1
    assert torch.equal(first["model"]["w"], before)
    assert first["optimizer"]["step"] == 7
    second = copies.of(state)
    assert second["model"]["w"].data_ptr() == address
    assert torch.equal(second["model"]["w"], weight)
    assert second["optimizer"]["step"] == 8


def test_another_shape_or_type_gets_another_buffer() -> None:
    copies = HostCopy(from_gpu=False)
    for tensor in (torch.zeros(2), torch.ones(3), torch.ones(3, dtype=torch.bfloat16)):
        copied = copies.of({"w": tensor})["w"]
        assert copied.dtype == tensor.dtype
        assert torch.equal(copied, tensor)
    copies.close()
    assert torch.equal(copies.of({"w": torch.full((3,), 2.0)})["w"], torch.full((3,), 2.0))


def test_prepared_memory_is_that_of_the_copies() -> None:
    state = {"w": torch.randn(3, 4), "step": torch.tensor(7.0), "lr": 0.1}
    copies = HostCopy(from_gpu=False)
    copies.prepare(state)
    prepared = [buffer.data_ptr() for buffer in copies._buffers.values()]
    copied = copies.of(state)
    assert [copied["w"].data_ptr(), copied["step"].data_ptr()] == prepared
    assert torch.equal(copied["w"], state["w"])
    left = HostCopy(from_gpu=False)
    left.close_soon()
    left.prepare(state)
    assert not left._buffers
