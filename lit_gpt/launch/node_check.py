"""Whether a node, or all nodes of a job, are fit for a long run; takes about a minute.

Each rank measures its GPU, the first rank of each node the disk, all ranks together the network and the clocks; rank 0
judges. What cannot be measured (no GPU, a single rank, no nvidia-smi) is reported as not checked, never as good. A GPU
is compared with the median of all, because a slow one slows every step. Rates of disk and network are only reported:
no limit fits all clusters.
"""

from __future__ import annotations

import importlib
import os
import shutil
import socket
import statistics
import subprocess
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from lit_gpt.launch.sensors import throttled_by

PACKAGES = ("lightning", "numpy", "pyarrow", "xxhash", "tokenizers", "tensorboard")
SLOW_GPU = 0.9
"""A GPU whose matmul rate is below this share of the median is unfit."""
CLOCK_OFFSET_S = 1.0
"""Largest offset between ranks, and between a node and its file system, that log times and Slurm's job end allow."""
MATMUL_SIZE, MATMUL_REPEATS = 8192, 30
ALL_REDUCE_BYTES = {"cuda": 1 << 30, "cpu": 1 << 24}


class GpuState(NamedTuple):
    """What nvidia-smi says of one GPU."""

    uncorrected_ecc_errors: int
    """Since the driver was loaded."""
    throttled: list[str]
    """Names from sensors.THROTTLED."""


class Measured(NamedTuple):
    """One rank's numbers; None where it could not be measured."""

    rank_name: str
    host: str
    gpu: str | None
    gpu_state: GpuState | None
    matmul_flops: float | None
    all_reduce_bytes_per_s: float | None
    write_bytes_per_s: float | None
    """To the run folder, fsync included; by the first rank of each node."""
    free_bytes: int
    """In the run folder's file system."""
    clock_offset_s: float
    """Of this rank's clock against rank 0's."""
    file_clock_offset_s: float | None
    """Of the file system's clock against this rank's."""
    versions: dict[str, str]
    """Package -> version, or why it does not load."""


class Finding(NamedTuple):
    """A line of the table; ok is None if it was not checked, or has no limit."""

    what: str
    value: str
    ok: bool | None


def measure(rank_name: str, device: torch.device, first_of_node: bool, run_dir: Path, write_bytes: int) -> Measured:
    """This rank's numbers. A collective: every rank calls it."""
    gpu = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    written = measure_disk(run_dir, write_bytes) if first_of_node else None
    return Measured(
        rank_name=rank_name,
        host=socket.gethostname(),
        gpu=f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB" if gpu else None,
        gpu_state=query_gpu(str(gpu.uuid)) if gpu else None,
        matmul_flops=_matmul_flops(device) if gpu else None,
        all_reduce_bytes_per_s=_all_reduce_rate(device) if dist.is_initialized() else None,
        write_bytes_per_s=written[0] if written else None,
        free_bytes=shutil.disk_usage(run_dir).free,
        clock_offset_s=_clock_offset_s(),
        file_clock_offset_s=written[1] if written else None,
        versions={name: _version(name) for name in ("torch", *PACKAGES)},
    )


def _matmul_flops(device: torch.device) -> float:
    """FLOP/s of a bf16 matmul, which is what training spends most time on."""
    a = torch.randn(MATMUL_SIZE, MATMUL_SIZE, device=device, dtype=torch.bfloat16)
    for _ in range(3):
        a @ a
    torch.cuda.synchronize(device)
    began = time.perf_counter()
    for _ in range(MATMUL_REPEATS):
        a @ a
    torch.cuda.synchronize(device)
    return 2 * MATMUL_SIZE**3 * MATMUL_REPEATS / (time.perf_counter() - began)


def _all_reduce_rate(device: torch.device) -> float:
    """Bytes a second over each link of a ring, which carries 2 (n - 1) / n of the buffer: nccl-tests' bus bandwidth."""
    buffer = torch.ones(ALL_REDUCE_BYTES[device.type] // 4, device=device)
    repeats, world = 5, dist.get_world_size()
    for repeat in range(repeats + 1):
        dist.all_reduce(buffer)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if repeat == 0:  # the first call also connects
            began = time.perf_counter()
    return 2 * (world - 1) / world * buffer.nbytes * repeats / (time.perf_counter() - began)


def measure_disk(run_dir: Path, write_bytes: int) -> tuple[float, float]:
    """(bytes written a second, fsync included; seconds by which the file system's clock is ahead of this machine's)."""
    path = run_dir / f".check-{socket.gethostname()}-{os.getpid()}"
    chunk = os.urandom(min(write_bytes, 16 << 20))  # random, so that compression does not make a file system look fast
    try:
        began = time.perf_counter()
        with path.open("xb", buffering=0) as file:
            for _ in range(max(1, write_bytes // len(chunk))):
                file.write(chunk)
            os.fsync(file.fileno())
        rate = max(1, write_bytes // len(chunk)) * len(chunk) / (time.perf_counter() - began)
        path.unlink()
        path.touch()
        return rate, path.stat().st_mtime - time.time()
    finally:
        path.unlink(missing_ok=True)


def _clock_offset_s(rounds: int = 7) -> float:
    """Of this rank against rank 0: the median over some barriers, which all ranks leave at nearly the same moment."""
    if not dist.is_initialized():
        return 0.0
    offsets = []
    for _ in range(rounds):
        dist.barrier()
        times = torch.zeros(dist.get_world_size(), dtype=torch.float64)
        times[dist.get_rank()] = time.time()
        dist.all_reduce(times)
        offsets.append(float(times[dist.get_rank()] - times[0]))
    return statistics.median(offsets)


def _version(package: str) -> str:
    try:
        return str(getattr(importlib.import_module(package), "__version__", "loads"))
    except ImportError as error:
        return f"does not load: {error}"


def query_gpu(uuid: str) -> GpuState | None:
    """ECC errors and throttling; None if nvidia-smi is missing or does not answer."""
    fields = "ecc.errors.uncorrected.volatile.total,clocks_throttle_reasons.active"
    name = uuid if uuid.startswith("GPU-") else f"GPU-{uuid}"
    command = ["nvidia-smi", f"--id={name}", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
        return parse_gpu(done.stdout)
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def parse_gpu(line: str) -> GpuState:
    """Parse a line such as "0, 0x0000000000000004"; a GPU without ECC has "[N/A]" in the first place."""
    errors, reasons = (part.strip() for part in line.strip().split(","))
    bits = int(reasons, 16)
    return GpuState(int(errors) if errors.isdigit() else 0, throttled_by(bits))


def judge(ranks: list[Measured], needed_bytes: int) -> list[Finding]:
    """The lines of the table; the nodes are fit if none has ok=False."""
    findings = [*_judge_gpus(ranks)]
    rates = [rank.all_reduce_bytes_per_s for rank in ranks if rank.all_reduce_bytes_per_s is not None]
    all_reduce = f"{min(rates) / 1e9:.2f} GB/s a link" if rates else "not checked: one process"
    findings.append(Finding(f"all-reduce over {len(ranks)} ranks", all_reduce, None))
    for rank in ranks:
        if rank.write_bytes_per_s is not None:
            written = f"{rank.write_bytes_per_s / 1e6:.0f} MB/s, fsync included"
            findings.append(Finding(f"run folder, written from {rank.host}", written, None))
            offset_s = rank.file_clock_offset_s or 0.0
            sane = abs(offset_s) <= CLOCK_OFFSET_S
            findings.append(Finding(f"clock of the run folder, from {rank.host}", f"{offset_s:+.3f} s", sane))
    free = min(rank.free_bytes for rank in ranks)
    space = f"{free / 1e9:.1f} GB free, {needed_bytes / 1e9:.1f} GB needed"
    findings.append(Finding("space for checkpoints", space, free >= needed_bytes))
    worst = max(ranks, key=lambda rank: abs(rank.clock_offset_s))
    clocks = f"{worst.clock_offset_s:+.3f} s, {worst.rank_name}" if len(ranks) > 1 else "not checked: one process"
    together = abs(worst.clock_offset_s) <= CLOCK_OFFSET_S if len(ranks) > 1 else None
    findings.append(Finding("clocks against rank 0", clocks, together))
    return findings + _judge_packages(ranks)


def _judge_gpus(ranks: list[Measured]) -> list[Finding]:
    rates = [rank.matmul_flops for rank in ranks if rank.matmul_flops is not None]
    if not rates:
        return [Finding("GPU", "not checked: no GPU is visible, or --accelerator cpu", None)]
    findings, median = [], statistics.median(rates)
    for rank in ranks:
        flops = rank.matmul_flops or 0.0
        value = f"{rank.gpu}: {flops / 1e12:.0f} bf16 TFLOP/s, {flops / median:.0%} of the median"
        findings.append(Finding(rank.rank_name, value, flops >= SLOW_GPU * median))
        if rank.gpu_state is None:
            findings.append(Finding(rank.rank_name, "memory errors and throttling not checked: no nvidia-smi", None))
            continue
        errors, throttled = rank.gpu_state
        health = f"{errors} uncorrected memory errors, {', '.join(throttled) or 'not throttled'}"
        findings.append(Finding(rank.rank_name, health, not errors and not throttled))
    return findings


def _judge_packages(ranks: list[Measured]) -> list[Finding]:
    findings = []
    for name, version in ranks[0].versions.items():
        others = sorted({rank.versions[name] for rank in ranks})
        same = len(others) == 1 and not version.startswith("does not load")
        findings.append(Finding(name, version if len(others) == 1 else f"differs: {', '.join(others)}", same))
    return findings
