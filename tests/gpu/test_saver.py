"""Checkpoints written while a model on a GPU changes: each of several holds the state at its save."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lit_gpt.checkpoint.checkpoint import load, verified
from lit_gpt.checkpoint.host_copy import HostCopy
from lit_gpt.checkpoint.record import checkpoint_name
from lit_gpt.checkpoint.saver import CheckpointSaver
from lit_gpt.config import Config
from lit_gpt.model.gpt import GPT, initialize
from lit_gpt.train.optimizer import make_optimizer
from lit_gpt.train.settings import OptimizerSettings

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("full", [True, False])
def test_three_saves_beside_updates(tmp_path: Path, full: bool) -> None:
    model = GPT(Config.from_name("debug")).cuda()
    initialize(model, seed=1)
    optimizer = make_optimizer(model, OptimizerSettings(), compiled=True)
    saver = CheckpointSaver(tmp_path, model, optimizer, full=full, overlap=True, keep_last=0)
    tokens = torch.randint(0, 4096, (2, 256), device="cuda")
    wanted = []
    for step in (1, 2, 3):
        model(tokens, None, tokens.roll(-1, 1)).backward()
        optimizer.step()
        optimizer.zero_grad()
        wanted.append([p.detach().clone() for p in model.parameters()])
        saver.save({"step": step, "slot": 8 * step, "tokens": 0, "settings": {}})
        with torch.no_grad():  # what comes after must not reach the file
            for p in model.parameters():
                p.add_(1)
    saver.wait()
    assert saver.failure is None
    saver.close()
    for step, weights in enumerate(wanted, start=1):
        load(verified(tmp_path / checkpoint_name(step)), model, optimizer)
        assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))


@pytest.mark.parametrize("full", [True, False])
def test_writing_does_not_wait_for_the_training_stream(tmp_path: Path, full: bool) -> None:
    model = GPT(Config.from_name("debug")).cuda()
    initialize(model, seed=1)
    saver = CheckpointSaver(
        tmp_path, model, make_optimizer(model, OptimizerSettings(), compiled=True), full=full, overlap=True, keep_last=0
    )
    saver.save({"step": 1, "slot": 8, "tokens": 0, "settings": {}})
    saver.wait()  # the first allocates
    saver.save({"step": 2, "slot": 16, "tokens": 0, "settings": {}})
    torch.cuda._sleep(6_000_000_000)  # 3 s at 2 GHz, far longer than writing takes
    asleep = torch.cuda.Event()
    asleep.record()
    saver.wait()
    assert not asleep.query()
    assert verified(tmp_path / checkpoint_name(2)).step == 2
    saver.close()


@pytest.mark.parametrize("prepared", [False, True])
def test_large_buffers_are_page_locked_once(prepared: bool) -> None:
    copies = HostCopy(from_gpu=True)
    state = {"large": torch.randn(1 << 20, device="cuda"), "small": torch.randn(3, device="cuda")}
    if prepared:
        copies.prepare(state)
    first = copies.of(state)["large"]
    assert first.is_pinned()
    state["large"].add_(1)
    second = copies.of(state)
    assert second["large"].data_ptr() == first.data_ptr()
    assert all(torch.equal(second[name], tensor.cpu()) for name, tensor in state.items())
    copies.close()
    assert not first.is_pinned()
