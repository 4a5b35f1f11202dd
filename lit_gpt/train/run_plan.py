"""What a run will need: GPU memory, tokens, time and disk. Computed before it starts, without GPU or processes."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import Literal, NamedTuple

from lit_gpt.config import Config
from lit_gpt.data.loader import check_batch_sizes
from lit_gpt.data.row_reader import RowReader, open_sources
from lit_gpt.train.cluster_plan import cluster_lines
from lit_gpt.train.memory_plan import (
    USABLE_SHARE,
    Memory,
    checkpoint_bytes,
    largest_gathered_unit,
    peak_bytes,
    step_memory,
)
from lit_gpt.train.muon_plan import NODE_BYTES_PER_S, MuonStep, muon_step
from lit_gpt.train.resolve import resolve_for_plan
from lit_gpt.train.run_length import Progress, RunLength, run_length
from lit_gpt.train.settings import Settings

GIB = 2**30


class Plan(NamedTuple):
    """What a run will need; `lines` prints it."""

    config: Config
    settings: Settings
    """Resolved by resolve_for_plan."""
    world_size: int
    shards: int
    """Ranks that one copy of the weights is sharded over."""
    memory: tuple[Memory, ...]
    """Of one GPU at three moments of a step (memory_plan.py)."""
    largest_micro_batch: int | None
    """Rows of the largest micro-batch that fits and divides a rank's rows of a step; None if none fits."""
    input_tokens_per_step: int
    """Tokens that the model reads in a step, padding included."""
    checkpoint_bytes: int
    checkpoints: int | None
    """Most checkpoints on disk at once: those that stay, and the one that is being written; None if that depends on
    the unknown length."""
    data_tokens: int | None
    """Tokens of the training data; None if the settings name no data."""
    length: RunLength | None
    """Of a run from its first step; None without data and limits."""


def plan(settings: Settings, flags: Collection[str] = ()) -> Plan:
    """The plan of a run with --devices x --num_nodes processes; raises BadInput for settings that cannot run.

    flags: names of the settings that the command line gave.
    """
    settings = resolve_for_plan(settings)
    devices = settings.devices or 1
    world_size = devices * settings.num_nodes
    shards = settings.shards(devices, world_size)
    check_batch_sizes(settings.global_batch_size, settings.micro_batch_size, world_size)
    config, data_tokens, data = settings.config, None, None
    if settings.train_sources:
        stores, weights = open_sources(settings.train_sources)
        config = settings.config_for(stores[0].vocab_size)
        data_tokens = sum(store.tokens for store in stores)
        data = RowReader(stores, config.block_size, settings.seed, weights=weights, packing=settings.packing)
    length = run_length(settings, flags, data, Progress())
    return Plan(
        config=config,
        settings=settings,
        world_size=world_size,
        shards=shards,
        memory=step_memory(config, settings, world_size, shards),
        largest_micro_batch=_largest_micro_batch(config, settings, world_size, shards),
        input_tokens_per_step=settings.global_batch_size * config.block_size,
        checkpoint_bytes=checkpoint_bytes(config, settings),
        checkpoints=_checkpoints(settings, length.steps if length else None),
        data_tokens=data_tokens,
        length=length,
    )


def _largest_micro_batch(config: Config, settings: Settings, world_size: int, shards: int) -> int | None:
    rows = settings.global_batch_size // world_size
    usable = settings.plan_gpu_gib * GIB * USABLE_SHARE
    for micro_batch_size in (size for size in range(rows, 0, -1) if rows % size == 0):
        tried = replace(settings, micro_batch_size=micro_batch_size)
        if peak_bytes(config, tried, world_size, shards) <= usable:
            return micro_batch_size
    return None


def _checkpoints(settings: Settings, steps: int | None) -> int | None:
    if steps is None:
        forever = not settings.keep_last_checkpoints or settings.keep_every_steps
        return None if forever else settings.keep_last_checkpoints + 1
    written = -(-steps // settings.save_interval_steps)
    kept_for_ever = 0
    if settings.keep_every_steps:
        kept_for_ever = steps // math.lcm(settings.save_interval_steps, settings.keep_every_steps)
    return min(written, (settings.keep_last_checkpoints or written) + kept_for_ever) + 1


def lines(plan: Plan) -> Iterator[str]:
    """The plan as text."""
    config, settings = plan.config, plan.settings
    yield f"{config.name}: {config.parameters:,} parameters, {config.block_size} tokens a row"
    yield (
        f"{plan.world_size} processes ({settings.num_nodes} nodes x {settings.devices or 1}), "
        f"{settings.sharding_strategy}: a copy of the weights on {plan.shards}, {settings.precision}, "
        f"activation checkpointing {settings.activation_checkpointing}"
    )
    if settings.mlp == "quack":
        yield "counted with --mlp quack, as on a Hopper GPU; elsewhere plan with --mlp torch, which needs more memory"
    yield ""
    yield from _memory_table(plan)
    if settings.precision == "32-true":
        scores = 4 * settings.micro_batch_size * config.n_layer * config.n_head * config.block_size**2
        yield f"not counted, for want of a measurement: attention's scores in fp32, some {scores / GIB:.2f} GiB"
    yield from _other_gradient_sync(plan)
    yield from _muon(plan)
    yield _fit(plan)
    yield ""
    yield from _length(plan)
    yield _time(plan)
    on_disk = ""
    if plan.checkpoints:
        on_disk = f"; at most {plan.checkpoints} on disk: {plan.checkpoints * plan.checkpoint_bytes / GIB:.2f} GiB"
    yield f"a checkpoint is {plan.checkpoint_bytes / GIB:.2f} GiB{on_disk}"
    if plan.settings.memory_checkpoint_dir:
        devices = plan.world_size // plan.settings.num_nodes
        of_node = 2 * plan.settings.share_of_node(devices, plan.world_size) * plan.checkpoint_bytes
        yield f"checkpoints in the memory of each node: {of_node / GIB:.2f} GiB, its part of two"
    if plan.world_size > 1:
        yield ""
        yield from cluster_lines(config, settings, plan.checkpoint_bytes)


def _length(plan: Plan) -> Iterator[str]:
    yield f"a step is {plan.settings.global_batch_size:,} rows, {plan.input_tokens_per_step:,} tokens"
    if plan.length is None:
        yield "length: give --max_steps, --max_tokens or --train_data_dir"
        return
    yield f"in all {plan.length}"
    if plan.data_tokens is not None:
        yield f"the training data has {plan.data_tokens:,} tokens"


def _memory_table(plan: Plan) -> Iterator[str]:
    titles = [memory.moment for memory in plan.memory]
    yield f"GiB of one GPU with {plan.settings.micro_batch_size} rows, at three moments of a step:"
    yield "  " + " " * 16 + "".join(f"{title:>10}" for title in titles)
    names = ("weights", "gradients", "optimizer", "weights in use", "activations", "logits and loss")
    rows = list(zip(names, *(memory[1:] for memory in plan.memory), strict=True))
    for name, *sizes in (*rows, ("total", *(memory.total for memory in plan.memory))):
        yield f"  {name:16}" + "".join(f"{size / GIB:10.2f}" for size in sizes)
    if plan.world_size > 1:
        unit = largest_gathered_unit(plan.config, plan.settings)
        yield f"weights in use hold the largest all-gathered unit: {unit / GIB:.2f} GiB"


def _other_gradient_sync(plan: Plan) -> Iterator[str]:
    """What the other --gradient_sync would hold at most, and what each of the two sends."""
    settings = plan.settings
    micro_batches = settings.global_batch_size // (settings.micro_batch_size * plan.world_size)
    if plan.world_size == 1 or micro_batches == 1:
        return
    other: Literal["step", "micro_batch"] = "micro_batch" if settings.gradient_sync == "step" else "step"
    peak = peak_bytes(plan.config, replace(settings, gradient_sync=other), plan.world_size, plan.shards)
    once = 4 * plan.config.parameters * (plan.shards - 1) // plan.shards  # fp32, reduce-scattered
    yield (
        f"gradients are added over ranks once a {settings.gradient_sync.replace('_', '-')} (--gradient_sync); once a "
        f"{other.replace('_', '-')} the total is at most {peak / GIB:.2f} GiB. A reduce-scatter sends "
        f"{once / GIB:.2f} GiB a GPU, and a step has {micro_batches} micro-batches"
    )


def _muon(plan: Plan) -> Iterator[str]:
    """What Muon computes and sends in a step, here and on other numbers of GPUs."""
    if plan.settings.optimizer != "muon" or plan.settings.precision == "32-true":
        return
    devices, port = plan.settings.devices or 1, plan.settings.plan_network_gb_per_s * 1e9

    def step(shards: int, node: int) -> MuonStep:
        return muon_step(plan.config, shards, number_bytes=2, bytes_per_s=NODE_BYTES_PER_S if shards <= node else port)

    here = step(plan.shards, devices)
    yield (
        f"Muon: a GPU orthogonalizes at most {here.matrices} matrices in a step, {here.flops / 1e12:.1f} TFLOP, and "
        f"sends at most {here.sent_bytes / GIB:.3f} GiB: some {here.seconds * 1e3:.1f} ms, by calculation"
    )
    others = [2**n for n in range(0, 10)]
    times = ", ".join(f"{step(shards, 8).seconds * 1e3:.1f}" for shards in others)
    yield f"  with a copy of the weights on 1, 2, 4 ... {others[-1]} GPUs, 8 a node: {times} ms"


def _fit(plan: Plan) -> str:
    gpu = f"{USABLE_SHARE:.0%} of {plan.settings.plan_gpu_gib:g} GiB (--plan_gpu_gib; the rest: fragmentation)"
    if plan.largest_micro_batch is None:
        return (
            f"no micro-batch fits {gpu}: shard over more GPUs (FULL_SHARD), or --activation_checkpointing full, or "
            "--precision bf16-true, or --gradient_sync micro_batch"
        )
    return f"largest micro_batch_size that fits {gpu}: {plan.largest_micro_batch}"


def _time(plan: Plan) -> str:
    rate = plan.settings.plan_tokens_per_s
    if plan.length is None:
        return "time: depends on the length"
    if rate is None:
        return "time: give a GPU's tokens/s by --plan_tokens_per_s (docs/benchmarks.md has measured rates)"
    seconds = plan.length.tokens / (rate * plan.world_size)
    gpu_hours = seconds * plan.world_size / 3600
    return f"time at {rate:,.0f} tokens/s a GPU: {seconds / 86400:.2f} days, {gpu_hours:,.0f} GPU hours"
