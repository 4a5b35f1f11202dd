"""What `auto` and None in the settings stand for, decided once: the settings that run, with nothing left open.

The rest of the run reads the resolved settings and decides nothing again. What was resolved is logged, written to
resolved.json beside settings.yaml and kept in every checkpoint, so that a repeat or a resume on a machine where
something resolves otherwise can say so.
"""

from __future__ import annotations

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
    "accelerator", "num_nodes", "devices", "attention", "mlp", "compile", "float8", "state_dict_type", "async_save",
)  # fmt: skip
"""Settings that resolved.json holds, as they run."""
KERNEL_PACKAGES = {
    "torch": "torch", "fa4": "flash-attn-4", "fa3": "flash-attn-3", "fa2": "flash-attn", "xformers": "xformers",
    "quack": "quack-kernels", "rowwise": "torchao", "compile": "triton",
}  # fmt: skip
"""Choice -> the package that computes it."""


def compute_dtype(settings: ModelSettings) -> torch.dtype:
    """The type that matmuls and attention compute in."""
    return torch.float32 if settings.precision == "32-true" else torch.bfloat16


def resolve_step(settings: Step, config: Config, world: World, device: torch.device) -> Step:
    """`settings` for steps of a model of `config`'s shape on this device; raises BadInput for what cannot run there.

    Deterministic mode, which rules out some kernels, must have been set (`launch` does).
    """
    dtype = compute_dtype(settings)
    mlp = "torch"
    if settings.float8 == "none":
        mlp = choose_mlp(settings.mlp, device, dtype, (config.n_embd, config.intermediate_size))
    choices: dict[str, Any] = dict(accelerator=world.accelerator, devices=world.devices, num_nodes=world.nodes)
    choices |= dict(attention=choose_backend(settings.attention, device, dtype), mlp=mlp)
    choices |= dict(compile=settings.compile if settings.compile is not None else device.type == "cuda")
    return replace(settings, **choices)


def resolve(settings: Settings, config: Config, world: World, device: torch.device) -> Settings:
    """`settings` for a run on `world`, of which this process has `device`; raises BadInput for what cannot run."""
    kind = settings.state_dict_type
    return replace(
        resolve_step(settings, config, world, device),
        state_dict_type=("full" if world.size == 1 else "sharded") if kind == "auto" else kind,
        async_save=settings.async_save if settings.async_save is not None else device.type == "cuda",
    )


def resolve_for_plan(settings: Step) -> Step:
    """`settings` as they resolve on a Hopper GPU that has every package, as far as memory depends on them."""
    mlp = settings.mlp
    if mlp == "auto":
        config = settings.config
        fits = why_not_shape(compute_dtype(settings), (config.n_embd, config.intermediate_size)) is None
        mlp = "quack" if fits and settings.float8 == "none" else "torch"
    return replace(settings, mlp=mlp, compile=settings.compile is not False)


def resolved_facts(settings: Settings) -> dict[str, Any]:
    """What resolved.json holds of resolved `settings`: each choice, and the versions of the packages that compute."""
    chosen = {"torch", settings.attention, settings.mlp, settings.float8, *(["compile"] if settings.compile else [])}
    versions: dict[str, str | None] = {}
    for package in sorted(KERNEL_PACKAGES[choice] for choice in chosen & KERNEL_PACKAGES.keys()):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # built from source, or a CPU build of torch that has no Triton
            versions[package] = None
    return {**{name: getattr(settings, name) for name in CHOICES}, "packages": versions}


def log_differences(before: dict[str, Any], now: dict[str, Any]) -> None:
    """A line for each choice that was resolved otherwise in the run, or the part of it, that this one repeats."""
    for name in CHOICES:
        if name in before and before[name] != now[name]:
            log.warning("%s: %s here, %s in the run that this one repeats or resumes", name, now[name], before[name])
    for package in sorted({*before.get("packages", {}), *now["packages"]}):
        then, here = (facts.get("packages", {}).get(package) for facts in (before, now))
        if then != here:
            log.warning("package %s: %s here, %s in the run that this one repeats or resumes", package, here, then)
