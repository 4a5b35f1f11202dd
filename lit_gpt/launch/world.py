"""From settings to processes and devices, through Fabric; one of the few readers of os.environ.

The launcher's world (srun, torchrun, or none) is compared with the settings before any process starts, because a
mismatch would otherwise wait for ranks that nobody starts. The ranks then meet (meeting.py). The function that shards
a model comes from the caller (train/sharding.py).
"""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch._inductor import config as inductor_config
from torch.distributed.device_mesh import DeviceMesh

from lit_gpt.cli import BadInput
from lit_gpt.files import rewrite
from lit_gpt.launch.fabric import (
    ClusterEnvironment,
    Fabric,
    LightningEnvironment,
    SingleDeviceStrategy,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from lit_gpt.launch.job import PARENT, host
from lit_gpt.launch.lifeline import Line
from lit_gpt.launch.meeting import MeetingStrategy, NotMet, StoppedBeforeMeeting
from lit_gpt.launch.settings import LaunchSettings, WatchdogSettings
from lit_gpt.launch.signals import StopFlag
from lit_gpt.launch.tally import tally

log = logging.getLogger(__name__)

STRAY = (
    "RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_RANK",
    "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "PMI_RANK", "PMI_SIZE",
    "PMIX_RANK", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS", "PALS_RANKID",
    "FLUX_TASK_RANK", "FLUX_JOB_SIZE", "JSM_NAMESPACE_RANK", "JSM_NAMESPACE_SIZE",
)  # fmt: skip
"""Variables of other launchers that tell a process its place: torch.distributed's own (which DeepSpeed, Kubeflow and
Azure ML set as well), Open MPI, MPICH and Intel MPI, PMIx, MVAPICH, PALS, Flux, LSF's jsrun."""

RECORDED_COLLECTIVES = 2000
"""Newest collectives of each rank that PyTorch's flight recorder keeps."""

NO_MULTIPROCESSOR = "2"
"""Value of NCCL_CTA_POLICY (NCCL_CTA_POLICY_ZERO); `launch` sets it on one node, if the environment has none."""

CUBLAS_WORKSPACES = (":4096:8", ":16:8")
"""Workspaces with which cuBLAS is deterministic, by its documentation; the first is faster."""


class World(NamedTuple):
    """The processes of a run."""

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
    """The run folder without --out_dir: $MODEL_NAME if set, else out/<model_name>."""
    return os.environ.get("MODEL_NAME") or os.path.join("out", model_name)


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
        bound = ". srun has bound a GPU to each task: give --gpus-per-node, or --gpu-bind=none" if gpus == 1 else ""
        raise BadInput(f"{devices} processes on a node with {gpus} visible GPUs: at most one process a GPU{bound}")
    if isinstance(environment, TorchElasticEnvironment):
        _require_torchrun("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    return World(accelerator, nodes, devices, environment)


def _require_torchrun(*names: str) -> None:
    for name in names:
        if name not in os.environ:
            raise BadInput(f"TORCHELASTIC_RUN_ID is in the environment, but torchrun's {name} is not: unset it")


def _launcher(settings: LaunchSettings) -> tuple[ClusterEnvironment, int, int | None]:
    """(environment, nodes, processes on each node), the last None if this program starts them; raises BadInput."""
    env = os.environ
    if "TORCHELASTIC_RUN_ID" in env:
        _require_torchrun("WORLD_SIZE", "LOCAL_WORLD_SIZE")
        per_node = _number("LOCAL_WORLD_SIZE", 1)
        return TorchElasticEnvironment(), _number("WORLD_SIZE", 1) // per_node, per_node
    if "SLURM_JOB_ID" in env and "SLURM_STEP_ID" in env and PARENT not in env:
        nodes, tasks = _number("SLURM_NNODES", 1), _number("SLURM_NTASKS", 1)
        in_step = _number("SLURM_STEP_NUM_TASKS", tasks)
        if in_step != tasks:
            raise BadInput(
                f"a Slurm job of {tasks} tasks, but this step has {in_step} (a shell of salloc?): start it with srun, "
                f"as in: srun python {sys.argv[0]} ..."
            )
        if tasks % nodes:
            raise BadInput(
                f"srun started {tasks} tasks on {nodes} nodes: give every node the same, by --ntasks-per-node"
            )
        if tasks > 1 and "SLURM_NTASKS_PER_NODE" not in env:
            raise BadInput(f"srun was given its {tasks} tasks by --ntasks: give --ntasks-per-node={tasks // nodes}")
        if tasks > 1:
            return SLURMEnvironment(auto_requeue=False), nodes, tasks // nodes
    elif PARENT not in env:
        for name, what in (("SLURM_NTASKS", "tasks"), ("SLURM_NNODES", "nodes")):
            if _number(name, 1) > 1:
                raise BadInput(f"a Slurm job of {env[name]} {what}, but this is no srun step: start it with srun")
    _refuse_stray()
    if settings.num_nodes > 1:
        raise BadInput(
            f"--num_nodes {settings.num_nodes}, but nothing starts the processes of the other nodes: start the program "
            f"by srun --nodes={settings.num_nodes} --ntasks-per-node=GPUS_OF_A_NODE, or by torchrun on each node"
        )
    return LightningEnvironment(), 1, None  # this program starts a rank for each device, also in a step of one task


def place_among_ranks() -> ClusterEnvironment | None:
    """How this process, one of several that a launcher or rank 0 has started, knows its rank and where the ranks meet;
    None if it is alone, or the first."""
    try:
        environment, _, tasks = _launcher(LaunchSettings())
        if isinstance(environment, TorchElasticEnvironment):
            _require_torchrun("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        rank, size = _number("LOCAL_RANK", 0), _number("WORLD_SIZE", 1)
    except BadInput:  # which this process has told, or another one
        return None
    if tasks is not None:
        return environment if environment.world_size() > 1 else None
    if PARENT not in os.environ or rank == 0:
        return None
    environment.set_global_rank(rank)
    environment.set_world_size(size)
    return environment


def _refuse_stray() -> None:
    """Raise BadInput if another launcher has started this process, or has left its variables behind."""
    if PARENT in os.environ:
        if _number(PARENT, 0) not in (os.getppid(), os.getpid()):
            raise BadInput(f"{PARENT}={os.environ[PARENT]}: the program that started this rank has ended. Unset it")
        return
    alone = {name: "1" if name.endswith(("SIZE", "NRANKS")) else "0" for name in STRAY}
    found = {name: os.environ[name] for name in STRAY if os.environ.get(name, "").strip() not in ("", alone[name])}
    if found:
        shown = ", ".join(f"{name}={value}" for name, value in found.items())
        raise BadInput(
            f"{shown} in the environment, but neither srun nor torchrun started this process. Start it by one of them, "
            f"or alone, which starts a process for each GPU: env {' '.join(f'-u {name}' for name in found)} python "
            f"{sys.argv[0]} ..."
        )
    for name in STRAY:  # "one process": harmless, but Fabric would take LOCAL_RANK=0 for a launcher's
        os.environ.pop(name, None)


def _number(name: str, default: int) -> int:
    value = os.environ.get(name, "").strip()
    if value and not value.isdigit():
        raise BadInput(f"{name}={os.environ[name]} in the environment is not a number: unset it")
    return int(value) if value else default


def be_deterministic() -> None:
    """Allow only deterministic kernels from here on; raises BadInput if the environment forbids it."""
    workspace = os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", CUBLAS_WORKSPACES[0])  # read when CUDA starts
    if workspace not in CUBLAS_WORKSPACES:
        raise BadInput(
            f"--deterministic with CUBLAS_WORKSPACE_CONFIG={workspace} in the environment: unset it. "
            f"Valid: {', '.join(CUBLAS_WORKSPACES)}"
        )
    inductor_config.deterministic = True  # no autotuning, which chooses a kernel by its time
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # written before read


def starts_alone(world: World) -> bool:
    """Whether no other rank exists yet: this process is the only one, or will start the others in `launch`."""
    return world.size == 1 or not world.environment.creates_processes_externally


def launch(
    settings: LaunchSettings,
    world: World,
    shard: Callable[[nn.Module, DeviceMesh], nn.Module] = lambda model, _: model,
    stop_flag: StopFlag | None = None,
    *,
    mesh_shape: Mapping[str, int] | None = None,
    limits: WatchdogSettings = WatchdogSettings(),  # noqa: B008 - it is immutable
) -> Fabric:
    """A launched Fabric: when it returns, the program runs in world.size processes. Raises BadInput for a taken port.

    shard: shards a model over the processes, on a mesh of mesh_shape (see make_mesh; None: one dimension);
    Fabric.setup_module calls it if there are several. stop_flag: learns of the ranks that this process starts. limits:
    how long the ranks wait for each other; then all end with exit code 1.
    Raises StoppedBeforeMeeting if a stop signal comes meanwhile.
    """
    if settings.deterministic:
        be_deterministic()
    if world.size > 1:
        _refuse_taken_port(world)
        if world.nodes == 1:  # read when NCCL's groups are made; train/copy_engines.py says what for
            os.environ.setdefault("NCCL_CTA_POLICY", NO_MULTIPROCESSOR)
    for name in ("lightning.fabric", "lightning.pytorch"):  # each rank would log a line
        logging.getLogger(name).setLevel(logging.WARNING)
    if world.size == 1:
        device = torch.device("cuda", 0) if world.accelerator == "cuda" else torch.device("cpu")
        fabric = Fabric(strategy=SingleDeviceStrategy(device), accelerator=world.accelerator, devices=1)
    else:
        strategy = MeetingStrategy(
            shard,
            mesh_shape or {"shard": world.size},
            # gloo: what ranks agree on lies in host memory, and must not wait for the GPU
            backend="cpu:gloo,cuda:nccl" if world.accelerator == "cuda" else "gloo",
            timeout=limits.group_timeout,
            limit_s=limits.watchdog_long_s,
            stopped=lambda: stop_flag is not None and stop_flag.received is not None,
        )
        fabric = Fabric(
            accelerator=world.accelerator,
            devices=world.devices,
            num_nodes=world.nodes,
            strategy=strategy,
            plugins=[world.environment],
        )
    if stop_flag is not None:
        stop_flag.children = lambda: getattr(fabric.strategy.launcher, "procs", ())
    if starts_alone(world) and world.size > 1:
        os.environ[PARENT] = str(os.getpid())
        os.environ["MASTER_ADDR"] = "127.0.0.1"
    try:
        fabric.launch()
    except StoppedBeforeMeeting:
        raise
    except NotMet as error:
        log.error("%s", error)
        sys.exit(error.exit_code)
    logging.getLogger().setLevel(logging.INFO if fabric.is_global_zero else logging.WARNING)
    return fabric


def _refuse_taken_port(world: World) -> None:
    """Raise BadInput if another job uses the port where the ranks meet: the jobs would wait for each other's ranks."""
    in_slurm = isinstance(world.environment, SLURMEnvironment)
    opens_port = world.environment.global_rank() == 0 if in_slurm else starts_alone(world)
    if not opens_port or "MASTER_PORT" not in os.environ:  # without the variable a free port is chosen
        return
    port = world.environment.main_port
    try:
        socket.create_server(("", port)).close()
    except OSError as error:
        raise BadInput(
            f"port {port} of {socket.gethostname()}, where the ranks would meet, cannot be used ({error.strerror}): "
            "set MASTER_PORT to a free one, such as 10000 + the job's number"
        ) from None


def takes_no_multiprocessor() -> bool:
    """Whether NCCL has been told to compute on none where it can do without."""
    return os.environ.get("NCCL_CTA_POLICY") == NO_MULTIPROCESSOR


def record_collectives(folder: Path) -> None:
    """Turn on NCCL's flight recorder, which writes to `folder` when a collective exceeds its timeout.

    Call it before `launch`. Variables that are set already win; their names hold for torch 2.10 to 2.14.
    """
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", str(RECORDED_COLLECTIVES))
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", str((folder / "nccl-rank-").resolve()))


def dump_collectives(folder: Path, rank: int) -> None:
    """Write the flight recorder's buffer now, in `torchfrtrace`'s format; does nothing without NCCL."""
    dump = getattr(torch._C._distributed_c10d, "_dump_nccl_trace", None)
    if dump is not None and dist.is_initialized() and "nccl" in dist.get_backend_config():
        rewrite(folder / f"nccl-rank-{rank}", dump())


def hold_line(fabric: Fabric, world: World, name: str, folder: Path, settings: WatchdogSettings) -> Line:
    """This rank's line to rank 0. A collective: every rank calls it. name: of the rank; folder: for stacks."""
    return Line(
        fabric.global_rank,
        world.size,
        name,
        share=fabric.broadcast,
        address=world.environment.main_address,
        silent_s=settings.silent_rank_s,
        first_of_node=fabric.local_rank == 0,
        folder=folder,
        dump=dump_collectives,
    )


def rank_name(rank: int, device: torch.device) -> str:
    """A rank's name in messages: its number, host, node of the job and GPU, for people who have to find it."""
    gpu = ""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        gpu = f", GPU {device.index} {properties.name} {properties.uuid}"
    return f"rank {rank} on {host()}{gpu}"


def any_rank(condition: bool) -> bool:
    """Whether `condition` is true on some rank. A collective: every rank calls it."""
    return tally([condition])[0] > 0
