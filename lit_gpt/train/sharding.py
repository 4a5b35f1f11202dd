"""Builds a run's model from its settings, and shards it over several processes.

One process: a plain module. Several: FSDP2 (`fully_shard`) inside Fabric's ModelParallelStrategy, each block a unit of
its own, on the device mesh of the sharding strategy.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from lit_gpt.config import Config
from lit_gpt.launch.fabric import Fabric
from lit_gpt.launch.signals import StopFlag
from lit_gpt.launch.world import World, launch
from lit_gpt.model.activation_checkpointing import checkpoint_activations
from lit_gpt.model.float8 import use_float8
from lit_gpt.model.gpt import GPT, initialize
from lit_gpt.train.copy_engines import gather_by_copy_engines
from lit_gpt.train.resolve import compute_dtype
from lit_gpt.train.settings import Settings, ShardingSettings, StepSettings


def build_model(fabric: Fabric, config: Config, settings: StepSettings) -> nn.Module:
    """The model with its initial weights on this rank's device: wrapped by Fabric, and sharded over several ranks.

    settings: resolved (resolve.py).
    """
    assert "auto" not in (settings.attention, settings.mlp)
    assert settings.compile is not None
    with torch.device("meta"):
        model = GPT(
            config,
            attention_backend=settings.attention,
            mlp_backend="float8" if settings.float8 == "tensorwise" else settings.mlp,
            compute_dtype=compute_dtype(settings),
        )
    if settings.precision == "bf16-true":
        model = model.bfloat16()
    # In this order parameter names stay the same: float8, activation checkpointing, compilation, sharding.
    if settings.float8 != "none":
        use_float8(model.transformer.h, settings.float8, fabric.device)
    for block in model.transformer.h:
        checkpoint_activations(block, settings.activation_checkpointing)
    if settings.compile:
        model.compile_parts()
    if fabric.world_size == 1:
        model.to_empty(device=fabric.device)
        initialize(model, settings.seed)
        if settings.global_batch_size > settings.micro_batch_size:
            for weight in model.parameters():
                weight.grad_dtype = torch.float32  # in which micro-batches add up, as they do with FSDP
    return fabric.setup_module(model)


def shard(model: nn.Module, settings: StepSettings, mesh: DeviceMesh) -> nn.Module:
    """The model, each block and itself an FSDP2 unit on the mesh, with initial weights on this rank's device."""
    assert isinstance(model, GPT)
    policy = MixedPrecisionPolicy(
        param_dtype=None if settings.precision == "32-true" else torch.bfloat16,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # RoPE's cos and sin stay fp32
    )
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh, reshard_after_forward=settings.reshards_after_forward, mp_policy=policy)
    fully_shard(model, mesh=mesh, reshard_after_forward=False, mp_policy=policy)
    gather_by_copy_engines(model, mesh)
    model.to_empty(device=mesh.device_type)  # the current device: Fabric has set it
    initialize(model, settings.seed)
    return model


def launch_run(settings: Settings, world: World, stop_flag: StopFlag) -> Fabric:
    """`launch`, with models sharded as the settings say."""
    return launch(
        settings,
        world,
        lambda model, mesh: shard(model, settings, mesh),
        stop_flag,
        mesh_shape=settings.mesh_shape(world.devices, world.size),
        limits=settings,
    )


def prepare_next_backward(module: nn.Module, settings: ShardingSettings, *, last: bool) -> None:
    """Say what the next backward pass reduces over ranks, and whether it frees gathered weights; last: of its step.

    With --gradient_sync micro_batch, gradients are reduce-scattered within a copy of the weights in each micro-batch;
    all-reduced over copies they are only in the last. Weights that stay gathered between forward and backward stay so
    until the step's last backward: they do not change before.
    """
    inner = getattr(module, "module", module)
    if isinstance(inner, FSDPModule):
        reduces = last or settings.gradient_sync == "micro_batch"
        inner.set_requires_gradient_sync(reduces)
        inner.set_requires_all_reduce(last)
        inner.set_is_last_backward(reduces)
        inner.set_reshard_after_backward(last or settings.reshards_after_forward)


def sum_shards_in_fp32(module: nn.Module) -> None:
    """After a micro-batch that is not the last: bf16 weights have bf16 gradients, whose sums would lose digits."""
    for weight in module.parameters():
        if weight.grad is not None and weight.grad.dtype != torch.float32:
            weight.grad_dtype = None  # any
            weight.grad = weight.grad.float()
