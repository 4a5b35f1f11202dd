"""Resolves the settings: decides once what `auto` and None stand for on this machine.

The rest of the run reads the resolved settings and decides nothing again. The choices are logged, written to
resolved.json beside settings.yaml and kept in every checkpoint, so a repeat or a resume on another machine can say
which choices differ there.
"""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TypeVar

import torch

from lit_gpt.config import Config
from lit_gpt.launch.world import World
from lit_gpt.model.attention import choose_backend
from lit_gpt.model.fused_mlp import choose_mlp, why_not_shape
from lit_gpt.model.settings import ModelSettings
from lit_gpt.train.settings import Settings, StepSettings

log = logging.getLogger(__name__)

Step = TypeVar("Step", bound=StepSettings)

CHOICES = (
    "vocab_size", "block_size", "accelerator", "num_nodes", "devices", "shard_group_size", "attention", "mlp",
    "compile", "float8", "state_dict_type", "async_save", "max_steps",
)  # fmt: skip
"""The settings that resolved.json holds, resolved; without those that do not apply."""
KERNEL_PACKAGES = {
    "torch": "torch", "fa4": "flash-attn-4", "fa3": "flash-attn-3", "fa2": "flash-attn", "xformers": "xformers",
    "quack": "quack-kernels", "rowwise": "torchao", "compile": "triton",
}  # fmt: skip
"""Choice -> package whose kernels it runs."""


def compute_dtype(settings: ModelSettings) -> torch.dtype:
    """The dtype of matmuls and attention."""
    return torch.float32 if settings.precision == "32-true" else torch.bfloat16


def resolve_step(settings: Step, config: Config, world: World, device: torch.device) -> Step:
    """`settings`, resolved for training steps of a `config` on this device; raises BadInput for what cannot run there.

    Deterministic mode rules out some kernels: it must be set before (`launch` does it).
    """
    dtype = compute_dtype(settings)
    mlp = "torch"
    if settings.float8 == "none":
        mlp = choose_mlp(settings.mlp, device, dtype, (config.n_embd, config.intermediate_size))
    choices: dict[str, Any] = dict(vocab_size=config.vocab_size, block_size=config.block_size)
    choices |= dict(accelerator=world.accelerator, devices=world.devices, num_nodes=world.nodes)
    if settings.sharding_strategy == "HYBRID_SHARD":
        choices |= dict(shard_group_size=settings.shards(world.devices, world.size))
    heads = (config.n_head, config.n_query_groups, config.head_size)
    choices |= dict(attention=choose_backend(settings.attention, device, dtype, heads), mlp=mlp)
    choices |= dict(compile=settings.compile if settings.compile is not None else device.type == "cuda")
    return replace(settings, **choices)


def resolve(settings: Settings, config: Config, world: World, device: torch.device) -> Settings:
    """`settings`, resolved for a run on `world` and this process's device; raises BadInput as resolve_step does."""
    kind = settings.state_dict_type
    return replace(
        resolve_step(settings, config, world, device),
        state_dict_type=("full" if world.size == 1 else "sharded") if kind == "auto" else kind,
        async_save=settings.async_save if settings.async_save is not None else device.type == "cuda",
    )


def resolve_for_plan(settings: Step) -> Step:
    """`settings`, as far as memory depends on them, as they resolve on a Hopper GPU with every optional package."""
    mlp = settings.mlp
    if mlp == "auto":
        config = settings.config
        fits = why_not_shape(compute_dtype(settings), (config.n_embd, config.intermediate_size)) is None
        mlp = "quack" if fits and settings.float8 == "none" else "torch"
    return replace(settings, mlp=mlp, compile=settings.compile is not False)


def resolved_choices(settings: Settings) -> dict[str, Any]:
    """What resolved.json holds: each choice of resolved `settings`, and the versions of the packages behind them."""
    chosen = {"torch", settings.attention, settings.mlp, settings.float8, *(["compile"] if settings.compile else [])}
    versions: dict[str, str | None] = {}
    for package in sorted(KERNEL_PACKAGES[choice] for choice in chosen & KERNEL_PACKAGES.keys()):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # built from source, or a CPU build of torch that has no Triton
            versions[package] = None
    choices = {name: value for name in CHOICES if (value := getattr(settings, name)) is not None}
    return {**choices, "packages": versions}


def in_words(resolved: dict[str, Any]) -> str:
    """What resolved.json holds, for the screen; without what the lines on kernels and on the run's length say."""
    processes, nodes = resolved["devices"] * resolved["num_nodes"], resolved["num_nodes"]
    parts = [
        f"{processes} process{'es' * (processes > 1)} on {nodes} node{'s' * (nodes > 1)} ({resolved['accelerator']})",
        f"rows of {resolved['block_size']:,} tokens",
        f"vocabulary of {resolved['vocab_size']:,}",
        "compiled" if resolved["compile"] else "not compiled",
        f"{resolved['state_dict_type']} checkpoints, written {_when(resolved['async_save'])}",
        *(f"{package} {version}" for package, version in resolved["packages"].items() if version is not None),
    ]
    if "shard_group_size" in resolved:
        parts.insert(1, f"sharded over {resolved['shard_group_size']}")
    if resolved["float8"] != "none":
        parts.insert(3, f"float8 {resolved['float8']}")
    return "this run: " + ", ".join(parts)


def _when(async_save: bool) -> str:
    return "while training goes on" if async_save else "while training waits"


def log_differences(before: dict[str, Any], now: dict[str, Any]) -> None:
    """Log a line for each choice that differs between the run that this one repeats or resumes, and this one."""
    pairs = [(name, now.get(name), before.get(name)) for name in CHOICES if name in before]
    packages_now, packages_before = now["packages"], before.get("packages", {})
    pairs += [
        (f"package {name}", packages_now.get(name), packages_before.get(name))
        for name in sorted({*packages_before, *packages_now})
    ]
    for name, here, then in pairs:
        if here != then:
            log.warning("%s: %s here, %s in the run that this one repeats or resumes", name, _told(here), _told(then))


def _told(value: Any) -> str:
    """As YAML has it."""
    return "not there" if value is None else value if isinstance(value, str) else json.dumps(value)
