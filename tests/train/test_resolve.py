"""What `auto` and None stand for: resolved once, written down, and logged where a repeat resolves differently."""

from __future__ import annotations

import logging
import re
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from lightning.fabric.plugins.environments import LightningEnvironment

from lit_gpt.cli import BadInput
from lit_gpt.datapoints.run_folder import read_resolved
from lit_gpt.launch.world import World
from lit_gpt.train.resolve import log_differences, resolve, resolve_for_plan, resolved_choices
from lit_gpt.train.settings import Settings, StepSettings

CPU = torch.device("cpu")


@pytest.mark.parametrize(("devices", "kind"), [(1, "full"), (2, "sharded")])
def test_on_a_cpu(devices: int, kind: str) -> None:
    asked = Settings(model_name="debug")
    resolved = resolve(asked, asked.config, World("cpu", 1, devices, LightningEnvironment()), CPU)
    choices = resolved_choices(resolved)
    assert choices.pop("packages") == {"torch": version("torch")}  # torch.__version__ may name a CUDA as well
    assert choices == {
        "vocab_size": 4096, "block_size": 256, "accelerator": "cpu", "num_nodes": 1, "devices": devices,
        "attention": "torch", "mlp": "torch",
        "compile": False, "float8": "none", "state_dict_type": kind, "async_save": False,
    }  # fmt: skip
    assert "auto" not in [getattr(resolved, field.name) for field in fields(resolved)]


def test_what_is_asked_for_stays() -> None:
    asked = Settings(model_name="debug", compile=True, async_save=True, state_dict_type="sharded", attention="torch")
    resolved = resolve(asked, asked.config, World("cpu", 1, 1, LightningEnvironment()), CPU)
    assert (resolved.compile, resolved.async_save, resolved.state_dict_type) == (True, True, "sharded")


@pytest.mark.parametrize(
    ("asked", "mlp"),
    [
        (dict(model_name="LLaMmlein_1B"), "quack"),
        (dict(model_name="LLaMmlein_1B", mlp="torch"), "torch"),
        (dict(model_name="LLaMmlein_1B", precision="32-true"), "torch"),
        (dict(model_name="LLaMmlein_1B", float8="tensorwise"), "torch"),
    ],
)
def test_a_plan_is_for_a_hopper_gpu(asked: dict[str, str], mlp: str) -> None:
    planned = resolve_for_plan(StepSettings(**asked))  # type: ignore[arg-type]
    assert (planned.mlp, planned.compile) == (mlp, True)
    assert not resolve_for_plan(StepSettings(compile=False)).compile


def test_a_line_for_each_difference(caplog: pytest.LogCaptureFixture) -> None:
    before = {"attention": "fa4", "compile": True, "async_save": True, "packages": {"torch": "2.11", "triton": "3.6"}}
    now = {"attention": "torch", "compile": True, "devices": 2, "async_save": False, "packages": {"torch": "2.11"}}
    with caplog.at_level(logging.WARNING):
        log_differences(before, dict.fromkeys(("accelerator", "mlp")) | now)
    assert [record.getMessage() for record in caplog.records] == [
        "attention: torch here, fa4 in the run that this one repeats or resumes",
        "async_save: false here, true in the run that this one repeats or resumes",
        "package triton: not there here, 3.6 in the run that this one repeats or resumes",
    ]


@pytest.mark.parametrize("content", ['{"attention": "fa', "", "[]", "5", "null", '{"packages": 3}', None])
def test_a_damaged_record_is_one_line(tmp_path: Path, content: str | None) -> None:
    """None: a folder of that name."""
    path = tmp_path / "resolved.json"
    path.mkdir() if content is None else path.write_text(content)
    with pytest.raises(BadInput, match=re.escape(str(path))):
        read_resolved(tmp_path)


def test_what_does_not_apply_is_left_out() -> None:
    world = World("cpu", 2, 2, LightningEnvironment())
    for strategy, group in (("FULL_SHARD", None), ("HYBRID_SHARD", 2)):
        asked = Settings(model_name="debug", sharding_strategy=strategy)  # type: ignore[arg-type]
        choices = resolved_choices(resolve(asked, asked.config, world, CPU))
        assert choices.get("shard_group_size") == group
        assert None not in choices.values()
