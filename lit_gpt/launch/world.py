"""From settings to processes and devices, through Fabric; with job.py the only reader of os.environ.

The launcher's world (srun, torchrun, or none) is compared with the settings before any process starts, because a
mismatch would otherwise hang until the job's time limit. How a model is spread over the processes is the caller's
(train/sharding.py), handed over as a function.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch._inductor import config as inductor_config

from lit_gpt.cli import EXIT_BAD_INPUT, BadInput
from lit_gpt.launch.fabric import (
    ClusterEnvironment,
    Fabric,
    LightningEnvironment,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from lit_gpt.launch.job import host
from lit_gpt.launch.settings import LaunchSettings

Result = TypeVar("Result")

COLLECTIVE_TIMEOUT = timedelta(minutes=10)
"""A collective that takes longer means a dead rank."""
RECORDED_COLLECTIVES = 2000
"""Of each rank, in the ring buffer of PyTorch's flight recorder."""

CUBLAS_WORKSPACES = (":4096:8", ":16:8")
"""Workspaces with which cuBLAS gives the same bits each time, as its documentation has it; the first is the faster."""


class World(NamedTuple):
    """Who takes part in a run."""

    accelerator: str
    """cpu or cuda."""
    nodes: int
    devices: int
    """Processes a node."""
    environment: ClusterEnvironment
    """How a process learns its rank."""

    @property
    def size(self) -> int:
        return self.nodes * self.devices


def default_run_dir(model_name: str) -> str:
    """The run folder when none is given: $MODEL_NAME, as the cluster scripts set it, else out/<model_name>."""
    return os.environ.get("MODEL_NAME") or os.path.join("out", model_name)


def on_rank_zero(fabric: Fabric, call: Callable[[], Result], *, share: bool = False) -> Result | None:
    """The result of `call`, made on rank 0 alone: None elsewhere, or with share=True the same on all ranks.

    A BadInput ends every rank; only rank 0 tells it.
    """
    result, error = None, None
    if fabric.is_global_zero:
        try:
            result = call()
        except BadInput as refused:
            error = refused
    refused_anywhere = fabric.broadcast(error)
    if refused_anywhere is not None:
        if fabric.is_global_zero:
            raise refused_anywhere
        sys.exit(EXIT_BAD_INPUT)
    return fabric.broadcast(result) if share else result


def find_world(settings: LaunchSettings) -> World:
    """The launcher's world, checked against the settings; raises BadInput if they differ or the device is missing."""
    accelerator = settings.accelerator
    if accelerator == "auto":
        accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    elif accelerator == "cuda" and not torch.cuda.is_available():
        raise BadInput("--accelerator cuda: no CUDA device is visible. Valid here: cpu")
    gpus = torch.cuda.device_count() if accelerator == "cuda" else None
    environment, nodes, tasks = _launcher(settings)
    devices = tasks or settings.devices or gpus or 1
    if tasks and settings.devices not in (None, tasks):
        raise BadInput(
            f"--devices {settings.devices}, but the launcher started {tasks} processes a node: make them equal"
        )
    if tasks and settings.num_nodes not in (1, nodes):
        raise BadInput(f"--num_nodes {settings.num_nodes}, but the launcher runs on {nodes} nodes: make them equal")
    if gpus is not None and devices > gpus:
        raise BadInput(f"{devices} processes on a node with {gpus} visible GPUs: at most one process a GPU")
    return World(accelerator, nodes, devices, environment)


def _launcher(settings: LaunchSettings) -> tuple[ClusterEnvironment, int, int | None]:
    """(environment, nodes, processes a node or None where we start them ourselves)."""
    env = os.environ
    if "TORCHELASTIC_RUN_ID" in env:
        per_node = int(env["LOCAL_WORLD_SIZE"])
        return TorchElasticEnvironment(), int(env["WORLD_SIZE"]) // per_node, per_node
    if "SLURM_JOB_ID" in env and "SLURM_STEP_ID" in env:
        nodes, tasks = int(env["SLURM_NNODES"]), int(env["SLURM_NTASKS"])
        if tasks % nodes:
            raise BadInput(
                f"srun started {tasks} tasks on {nodes} nodes: give every node the same, by --ntasks-per-node"
            )
        if tasks > 1 and "SLURM_NTASKS_PER_NODE" not in env:
            raise BadInput(f"srun was given its {tasks} tasks by --ntasks: give --ntasks-per-node={tasks // nodes}")
        return SLURMEnvironment(auto_requeue=False), nodes, tasks // nodes
    if int(env.get("SLURM_NTASKS", 1)) > 1:
        raise BadInput(f"a Slurm job of {env['SLURM_NTASKS']} tasks, but this is no srun step: start it with srun")
    return LightningEnvironment(), settings.num_nodes, None


def be_deterministic() -> None:
    """From here on only kernels that give the same bits each time; raises BadInput if the environment forbids it."""
    workspace = os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", CUBLAS_WORKSPACES[0])  # read when CUDA starts
    if workspace not in CUBLAS_WORKSPACES:
        raise BadInput(
            f"--deterministic with CUBLAS_WORKSPACE_CONFIG={workspace} in the environment: unset it. "
            f"Valid: {', '.join(CUBLAS_WORKSPACES)}"
        )
    inductor_config.deterministic = True  # no kernel is chosen by a stopwatch
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # written before read


def starts_alone(world: World) -> bool:
    """This process has no peers yet: it is the only one, or the one that starts the others in `launch`."""
    return world.size == 1 or not world.environment.creates_processes_externally


def launch(
    settings: LaunchSettings, world: World, shard: Callable[[nn.Module], nn.Module] = lambda model: model
) -> Fabric:
    """A launched Fabric: from here on this code runs in world.size processes.

    shard: spreads a model over the processes; Fabric.setup_module calls it where there are several.
    """
    if settings.deterministic:
        be_deterministic()
    if world.size > 1:
        _refuse_taken_port(world)
    # the launcher was found and checked above, also where srun is installed and not used
    warnings.filterwarnings("ignore", message="The `srun` command is available on your system")
    for name in ("lightning.fabric", "lightning.pytorch"):  # their banner of ranks, a line from each
        logging.getLogger(name).setLevel(logging.WARNING)
    if world.size == 1:
        device = torch.device("cuda", 0) if world.accelerator == "cuda" else torch.device("cpu")
        fabric = Fabric(strategy=SingleDeviceStrategy(device), accelerator=world.accelerator, devices=1)
    else:
        strategy = ModelParallelStrategy(
            lambda model, _: shard(model),
            data_parallel_size=world.size,
            tensor_parallel_size=1,
            # gloo carries what ranks agree on from host memory, without waiting for the GPU
            process_group_backend="cpu:gloo,cuda:nccl" if world.accelerator == "cuda" else "gloo",
            timeout=COLLECTIVE_TIMEOUT,
        )
        fabric = Fabric(
            accelerator=world.accelerator,
            devices=world.devices,
            num_nodes=world.nodes,
            strategy=strategy,
            plugins=[world.environment],
        )
    fabric.launch()
    if not fabric.is_global_zero:
        logging.getLogger().setLevel(logging.WARNING)
    return fabric


def _refuse_taken_port(world: World) -> None:
    """Two jobs that meet on a port would wait for each other's ranks; raises BadInput before ours are asked to come."""
    in_slurm = isinstance(world.environment, SLURMEnvironment)
    opens_it = world.environment.global_rank() == 0 if in_slurm else starts_alone(world)
    if not opens_it or "MASTER_PORT" not in os.environ:  # without the variable a free one is chosen
        return
    port = world.environment.main_port
    try:
        socket.create_server(("", port)).close()
    except OSError as error:
        raise BadInput(
            f"port {port} of {socket.gethostname()}, where the ranks would meet, cannot be used ({error.strerror}): "
            "set MASTER_PORT to a free one, such as 10000 + the job's number"
        ) from None


def record_collectives(folder: Path) -> None:
    """Let NCCL's flight recorder run, and write to `folder` when a collective runs into COLLECTIVE_TIMEOUT.

    Before `launch`. What is set in the environment wins; the names are those of torch 2.10 to 2.14.
    """
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", str(RECORDED_COLLECTIVES))
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", str((folder / "nccl-rank-").resolve()))


def dump_collectives(folder: Path, rank: int) -> None:
    """Write the flight recorder's buffer now, as `torchfrtrace` reads it; nothing to write without NCCL."""
    dump = getattr(torch._C._distributed_c10d, "_dump_nccl_trace", None)
    if dump is not None and dist.is_initialized() and "nccl" in dist.get_backend_config():
        (folder / f"nccl-rank-{rank}").write_bytes(dump())


def describe_rank(rank: int, device: torch.device) -> str:
    """Which process on which hardware, for the people who have to find it: rank, host, node of the job, GPU."""
    gpu = ""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        gpu = f", GPU {device.index} {properties.name} {properties.uuid}"
    return f"rank {rank} on {host()}{gpu}"


def any_rank(yes: bool) -> bool:
    """Whether it is true on some rank; every rank calls it."""
    number = torch.tensor(int(yes))
    if dist.is_initialized():
        dist.all_reduce(number)
    return number.item() > 0
