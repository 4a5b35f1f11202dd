"""What a training step costs on this device, and where its time goes; what scripts/benchmark_step.py prints.

The step is the training program's own (train_step.py), on rows of packed documents: random tokens, with the lengths of
German web text. They are made once and copied to the device at each step; loading, logging and saving are left out.
Times are medians by the device's clock, after a warm-up that compiles, of steps that follow each other without a wait.
Of several processes each makes its own rows; rank 0 tells its times.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from lit_gpt.bench.timing import device_seconds
from lit_gpt.config import IGNORE_INDEX, Config
from lit_gpt.data.loader import Batch, cu_seqlens_entries
from lit_gpt.launch.world import find_world, launch
from lit_gpt.train.memory_plan import stored_bytes
from lit_gpt.train.muon_plan import NODE_BYTES_PER_S, matrix_numbers, muon_step
from lit_gpt.train.optimizer import make_optimizer
from lit_gpt.train.resolve import resolve_step
from lit_gpt.train.settings import StepSettings
from lit_gpt.train.sharding import build_model, shard
from lit_gpt.train.speed_monitor import peak_flops
from lit_gpt.train.train_step import TrainStep

# Shapes: B rows of a micro-batch, T tokens a row, C width, L blocks.

MEDIAN_TOKENS, SIGMA = 368, 1.14
"""Of a document's length: log-normal, as German web text has it (docs/benchmarks.md)."""
SCHEDULE_STEPS = 1_430_512
"""Length of the schedule, unless max_steps says another: that of the published recipe."""
MATMUL_SIDE = 8192
"""Of the square matrices that measure the device's matmul rate."""
COPY_BYTES = 1 << 30
PROFILED_STEPS = 3

PARTS = ("attention", "products", "float8 casts", "loss", "optimizer", "rest")
COMMUNICATION = "communication"
_CASTS = "float8_"
"""How the names of float8_triton.py's kernels begin."""
_KERNELS = {
    "attention": ("flash", "attn", "attention", "fmha"),
    "products": ("gemm", "quack", "nvjet", "cutlass", "xmma", "splitk"),
}
"""Parts of kernels' names, in lower case."""


class StepBench:
    """A model of `settings` on one device, and batches for it."""

    def __init__(self, settings: StepSettings, *, distinct_steps: int = 4) -> None:
        self.config: Config = settings.config
        world = find_world(settings)
        shape = settings.mesh_shape(world.devices, world.size)
        self.fabric = launch(settings, world, lambda model, mesh: shard(model, settings, mesh), mesh_shape=shape)
        self.device = self.fabric.device
        settings = resolve_step(settings, self.config, world, self.device)
        self.settings = settings = replace(settings, max_steps=settings.max_steps or SCHEDULE_STEPS)
        self.model = build_model(self.fabric, self.config, settings)
        self.optimizer = make_optimizer(self.model, settings, compiled=bool(settings.compile))
        self.train_step = TrainStep(self.fabric, self.model, self.optimizer, settings)
        generator = np.random.default_rng([settings.seed, self.fabric.global_rank])
        self.ranks = world.size
        micro_batches = settings.global_batch_size // (settings.micro_batch_size * self.ranks)
        self._steps = [[self._batch(generator) for _ in range(micro_batches)] for _ in range(distinct_steps)]
        self._targets = [sum(int((b.targets != IGNORE_INDEX).sum()) for b in step) for step in self._steps]
        """Valid targets of this rank."""
        self._done = 0
        self._skipped = torch.zeros((), dtype=torch.int64, device=self.device)

    def _batch(self, generator: np.random.Generator) -> Batch:
        rows, length = self.settings.micro_batch_size, self.config.block_size
        cu_seqlens, document_ends = packed_documents(rows, length, generator)
        tokens = torch.from_numpy(generator.integers(0, self.config.vocab_size, (rows, length)).astype(np.uint16))
        targets = torch.from_numpy(generator.integers(0, self.config.vocab_size, rows * length).astype(np.int32))
        targets[torch.from_numpy(document_ends) - 1] = IGNORE_INDEX  # a document's last token predicts nothing
        targets = targets.view(rows, length)
        if self.device.type == "cuda":
            tokens, targets, cu_seqlens = (x.pin_memory() for x in (tokens, targets, cu_seqlens))
        return Batch(tokens, targets, cu_seqlens, np.arange(rows))

    def step(self) -> tuple[Tensor, int]:
        """One update: this rank's summed loss on the device, and its valid targets."""
        which = self._done % len(self._steps)
        update = self.train_step.update(self._done, self._steps[which], self._targets[which] * self.ranks)
        self._done += 1
        self._skipped += update.verdict != 0
        return update.loss_sum, self._targets[which]

    def require_updates(self) -> None:
        """Raise if updates were skipped: the times of such steps mean nothing."""
        if skipped := int(self._skipped):
            raise RuntimeError(f"{skipped} of {self._done} updates were skipped, their gradients were not finite")

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def packed_documents(rows: int, length: int, generator: np.random.Generator) -> tuple[Tensor, np.ndarray]:
    """cu_seqlens (S + 1,) int32 of random documents packed into rows, and the document ends below the last."""
    size = rows * length
    lengths = np.exp(generator.normal(np.log(MEDIAN_TOKENS), SIGMA, size)).astype(np.int64) + 1
    document_ends = np.cumsum(lengths)
    document_ends = document_ends[document_ends < size]
    needed = np.union1d(np.arange(0, size + 1, length), document_ends)
    cu_seqlens = torch.full((cu_seqlens_entries(len(needed)),), size, dtype=torch.int32)
    cu_seqlens[: len(needed)] = torch.from_numpy(needed.astype(np.int32))
    return cu_seqlens, document_ends


def measure(settings: StepSettings, *, steps: int, warmup: int, breakdown: bool) -> Iterator[dict[str, Any]]:
    """The step's speed, and with `breakdown` where its time goes; one dictionary a line of output, from rank 0."""
    started = time.perf_counter()
    bench = StepBench(settings)
    settings = bench.settings
    loss = 0.0
    for index in range(warmup):
        loss_sum, targets = bench.step()
        loss = loss_sum.item() / targets
        if index == 0:
            first_step_s = time.perf_counter() - started
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(bench.device)
    seconds = device_seconds(bench.step, bench.device, steps)
    bench.require_updates()
    median = statistics.median(seconds)
    tokens = statistics.mean(bench._targets)
    rate = tokens / median
    line: dict[str, Any] = {
        "what": "step", "size": settings.model_name, "precision": settings.precision, "float8": settings.float8,
        "optimizer": settings.optimizer, "attention": settings.attention, "mlp": bench.model.mlp_backend,
        "checkpointing": settings.activation_checkpointing,
        "deterministic": settings.deterministic, "compile": settings.compile,
        "devices": bench.ranks, "sharding_strategy": settings.sharding_strategy,
        "gradient_sync": settings.gradient_sync,
        "rows": settings.global_batch_size // bench.ranks, "micro_batch": settings.micro_batch_size,
        "value": round(rate), "unit": "tokens/s" + " a device" * (bench.ranks > 1),
        "ms": round(median * 1e3, 2), "spread": round((max(seconds) - min(seconds)) / median, 3),
        "first_step_s": round(first_step_s, 1), "loss_after_warmup": round(loss, 4),
    }  # fmt: skip
    if bench.device.type == "cuda":
        line["memory_gib"] = round(torch.cuda.max_memory_allocated(bench.device) / 2**30, 2)
        if peak := peak_flops(torch.cuda.get_device_name(bench.device)):
            for name, with_embedding in (("mfu_palm", True), ("mfu", False)):
                line[name] = round(rate * bench.config.flops_per_token(with_embedding=with_embedding) / peak, 4)
    if bench.fabric.is_global_zero:
        yield line
    if breakdown:
        lines = list(_breakdown(bench, median))
        yield from lines if bench.fabric.is_global_zero else ()


def _breakdown(bench: StepBench, step_s: float) -> Iterator[dict[str, Any]]:
    """Milliseconds of a step by part, beside the least time that the device's measured rates allow.

    "no kernel running" is the time of a timed step less the kernels of other steps, which were profiled: if these ran
    slower, it is a few ms below 0. Of communication the part beside which nothing is computed counts.
    """
    if bench.device.type != "cuda":
        return
    flops_s, bytes_s = _matmul_rate(bench.device), _copy_rate(bench.device)
    yield {"what": "rate of bf16 products", "value": round(flops_s / 1e12, 1), "unit": "TFLOP/s"}
    yield {"what": "rate of copies", "value": round(bytes_s / 1e9), "unit": "GB/s, read and written"}
    spent, kernels, communication_s = _time_by_part(bench)
    floors = _floors(bench, flops_s, bytes_s)
    for part in PARTS:
        line: dict[str, Any] = {"what": part, "value": round(spent[part] * 1e3, 2), "unit": "ms"}
        line["share"] = round(spent[part] / step_s, 3)
        if part in floors:
            line |= {"floor_ms": round(floors[part] * 1e3, 2), "of_floor": round(floors[part] / spent[part], 3)}
        yield line
    if bench.ranks > 1:
        line = {"what": "communication", "value": round(communication_s * 1e3, 2), "unit": "ms"}
        alone = spent[COMMUNICATION]
        yield line | {"not_overlapped_ms": round(alone * 1e3, 2), "share": round(alone / step_s, 3)}
    idle = step_s - sum(spent.values())
    yield {"what": "no kernel running", "value": round(idle * 1e3, 2), "unit": "ms", "share": round(idle / step_s, 3)}
    for (part, name), seconds in sorted(kernels.items(), key=lambda item: -item[1])[:24]:
        yield {"what": "kernel", "part": part, "value": round(seconds * 1e3, 2), "unit": "ms", "name": name[:90]}


def _time_by_part(bench: StepBench) -> tuple[dict[str, float], dict[tuple[str, str], float], float]:
    """Seconds a step of each part, and of each kernel: by the operator that launched it, else by its name; and those of
    all communication, of which the part counts what no other kernel overlaps."""
    bench.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        for _ in range(PROFILED_STEPS):
            bench.step()
        bench.synchronize()
    parts: dict[str, float] = defaultdict(float)
    kernels: dict[tuple[str, str], float] = defaultdict(float)
    spans: dict[bool, list[tuple[int, int]]] = {True: [], False: []}  # communication or not: starts and ends, ns
    # calls of the CUDA runtime count their ids apart from operators
    operators = {e.id: e for e in recorded.events() or [] if not e.name.startswith("cu")}
    assert recorded.profiler is not None
    for event in recorded.profiler.kineto_results.events():
        if event.device_type() != DeviceType.CUDA or event.is_user_annotation():
            continue
        part = _part(operators.get(event.linked_correlation_id()), event.name())
        seconds = event.duration_ns() / 1e9 / PROFILED_STEPS
        spans[part == COMMUNICATION].append((event.start_ns(), event.start_ns() + event.duration_ns()))
        parts[part] += seconds
        kernels[part, event.name()] += seconds
    communication_s = parts[COMMUNICATION]
    busy, computing = covered_ns(spans[True] + spans[False]), covered_ns(spans[False])
    parts[COMMUNICATION] = (busy - computing) / 1e9 / PROFILED_STEPS
    return parts, kernels, communication_s


def covered_ns(spans: list[tuple[int, int]]) -> int:
    """Nanoseconds that lie in at least one of the spans (start, end)."""
    covered, reached = 0, 0
    for start, end in sorted(spans):
        covered += max(0, end - max(start, reached))
        reached = max(reached, end)
    return covered


def _part(operator: Any, kernel: str) -> str:
    if "nccl" in kernel.lower():
        return COMMUNICATION
    while operator is not None:
        if "LinearCrossEntropy" in operator.name:
            return "loss"
        if operator.name.startswith("Optimizer."):
            return "optimizer"
        operator = operator.cpu_parent
    if kernel.startswith(_CASTS):
        return "float8 casts"
    name = kernel.lower()
    if name.startswith("triton"):  # fused by torch.compile: named after all that it does
        return "rest"
    return next((part for part, words in _KERNELS.items() if any(word in name for word in words)), "rest")


def _floors(bench: StepBench, flops_s: float, bytes_s: float) -> dict[str, float]:
    """Seconds that a step's GEMMs and the optimizer's memory traffic take at the device's measured rates."""
    config, settings = bench.config, bench.settings
    tokens = settings.global_batch_size // bench.ranks * config.block_size
    blocks = config.n_layer * config.block_parameters
    recompute = 8 if settings.activation_checkpointing == "full" else 6
    faster = 1 if settings.float8 == "none" else 2
    lengths = [np.diff(batch.cu_seqlens.numpy()).astype(np.float64) for step in bench._steps for batch in step]
    pairs = sum(float((x * x).sum()) for x in lengths) / 2 / len(bench._steps)
    # AdamW reads four numbers and writes three; Muon three and two, and it writes and reads updates in bf16
    stored, by_muon = stored_bytes(settings), settings.optimizer == "muon"
    matrices = matrix_numbers(config) if by_muon else 0
    optimizer_bytes = (7 * stored * config.parameters - (2 * stored - 4) * matrices) / bench.ranks
    shards = settings.shards(settings.devices or 1, bench.ranks)
    muon = muon_step(config, shards, number_bytes=2, bytes_per_s=NODE_BYTES_PER_S)
    return {
        "attention": 14 * pairs * config.n_embd * config.n_layer / flops_s,  # two GEMMs forward, five backward
        "products": recompute * blocks * tokens / flops_s / faster,
        "loss": 6 * config.padded_vocab_size * config.n_embd * tokens / flops_s,
        "optimizer": optimizer_bytes / bytes_s + (muon.flops / flops_s if by_muon else 0.0),
    }


def _matmul_rate(device: torch.device) -> float:
    """FLOP/s of a bf16 matmul of square matrices of random numbers."""
    a, b = (torch.randn(MATMUL_SIDE, MATMUL_SIDE, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * MATMUL_SIDE**3 / statistics.median(device_seconds(lambda: a @ b, device, 20, warmup=3))


def _copy_rate(device: torch.device) -> float:
    """Bytes a second, read and written, of a copy in device memory."""
    source = torch.randint(0, 256, (COPY_BYTES,), device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / statistics.median(device_seconds(lambda: target.copy_(source), device, 20, warmup=3))
