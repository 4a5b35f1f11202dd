"""Settings of a training run: every knob, its unit and its default. No torch, so `--help` is instant.

A room owns the slice that it reads (lit_gpt/<room>/settings.py); a run's settings are the sum of the slices, flat. A
function's signature names the narrowest slice that holds what it reads. Precedence: defaults < YAML files (`--config`)
< command line. `check` refuses what can be refused without looking at data, devices or checkpoints; the module that
looks at these refuses the rest. train/resolve.py decides once what `auto` and None stand for.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Literal

from lit_gpt.checkpoint.settings import CheckpointSettings
from lit_gpt.cli import BadInput, SettingsSlice
from lit_gpt.data.settings import DataSettings
from lit_gpt.datapoints.settings import DatapointSettings
from lit_gpt.launch.settings import LaunchSettings, StopSettings, WatchdogSettings
from lit_gpt.model.settings import ModelSettings

COMMON = (
    "model_name", "train_data_dir", "val_data_dir", "tokenizer_path", "out_dir", "resume", "max_steps", "max_tokens",
    "max_epochs", "learning_rate",
    "min_lr", "warmup_steps", "global_batch_size", "micro_batch_size", "sharding_strategy", "precision", "devices",
    "num_nodes", "log_interval_steps", "eval_interval_steps", "save_interval_steps", "wandb", "plan",
)  # fmt: skip
"""The settings that --help lists first."""
LIMITS = ("max_steps", "max_tokens", "max_epochs")
"""The settings that end a run (run_length.py)."""


@dataclass(frozen=True)
class OptimizerSettings(SettingsSlice):
    """The optimizer and its schedule."""

    max_steps: int | None = None
    """Most optimizer updates of the whole run, over all its attempts. The smallest of the limits given (also
    max_tokens, max_epochs) ends the run and its schedule."""
    max_tokens: int | None = None
    """Most tokens that the model reads in the whole run, padding included; the run ends with the last whole step."""
    learning_rate: float = 2.5e-4
    """Peak learning rate."""
    min_lr: float = 4e-6
    """Learning rate of the last step; constant never falls to it."""
    warmup_steps: int = 2000
    """Steps of linear warm-up from 0 to learning_rate."""
    lr_schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """After warm-up: cosine falls to min_lr; wsd stays at the peak, then falls linearly to min_lr in the last
    decay_steps; constant stays at the peak."""
    decay_steps: int = 0
    """Steps of the final decay; only for wsd."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: the matrices of the blocks by Muon, whose updates are orthogonal and as large as AdamW's, so that learning
    rate and weight decay carry over; embedding, head and norms by AdamW. A resume keeps its run's."""
    weight_decay: float = 0.1
    """Decoupled weight decay; on matrices only."""
    beta1: float = 0.9
    """AdamW's decay rate of the first moment."""
    beta2: float = 0.95
    """AdamW's decay rate of the second moment."""
    muon_momentum: float = 0.95
    """Muon's decay rate of the gradients' average (Nesterov momentum)."""
    muon_cautious_weight_decay: bool = False
    """Muon's weight decay leaves out the weights that the update makes larger."""
    grad_clip: float = 1.0
    """Largest global gradient norm: gradients above it are scaled down to it; 0 turns clipping off."""

    def check(self) -> None:
        super().check()
        self.require_at_least(1, "max_steps", "max_tokens")
        self.require_not_negative("warmup_steps", "decay_steps", "weight_decay", "grad_clip", "min_lr")
        self.require_above(0, "learning_rate")
        if self.min_lr > self.learning_rate:
            raise BadInput(
                f"--min_lr {self.min_lr} is above --learning_rate {self.learning_rate}: the schedule would rise "
                f"({self.lr_schedule}, {self.warmup_steps} steps of warm-up)"
            )
        if (self.lr_schedule == "wsd") != (self.decay_steps > 0):
            raise BadInput(
                f"--decay_steps {self.decay_steps} with --lr_schedule {self.lr_schedule}: "
                "only wsd has a final decay, of at least 1 step"
            )
        if self.max_steps is not None:
            self.require_schedule_fits(self.max_steps, "max_steps")
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise BadInput(f"--beta1 {self.beta1} --beta2 {self.beta2}: each must lie in [0, 1)")
        if not 0 <= self.muon_momentum < 1:
            raise BadInput(f"--muon_momentum {self.muon_momentum}: must lie in [0, 1)")
        for name in ("muon_momentum", "muon_cautious_weight_decay"):
            if self.optimizer != "muon" and (value := getattr(self, name)) != getattr(OptimizerSettings, name):
                raise BadInput(f"--{name} {value} with --optimizer {self.optimizer}: only muon has it")

    def require_schedule_fits(self, steps: int, limit: str) -> None:
        """Raise BadInput if warm-up and final decay do not fit in a run that `limit` ends after `steps` steps."""
        if self.warmup_steps + self.decay_steps > steps:
            given = getattr(self, limit)
            ends = "" if given == steps else f", which ends the run after {steps} steps"
            raise BadInput(
                f"--warmup_steps {self.warmup_steps} and --decay_steps {self.decay_steps} "
                f"do not fit in --{limit} {given}{ends}: together at most {steps}"
            )


@dataclass(frozen=True)
class SpikeSettings(SettingsSlice):
    """Skipped updates, and what a spike of the gradient norm does."""

    max_skipped_steps: int = 10
    """After so many skipped updates in a row (loss or gradients not finite, or spikes) the run saves and stops with
    exit code 3."""
    spike_policy: Literal["none", "skip", "rollback"] = "none"
    """What a spike does. none: nothing; skip: the step's update is skipped; rollback: the run goes back to its last
    checkpoint and leaves out the rows that led to the spike (before the first checkpoint: as skip)."""
    spike_factor: float = 10.0
    """A gradient norm above this many times the median of recent norms is a spike."""
    spike_window_steps: int = 128
    """The median is taken over so many applied updates; nothing is a spike before half of them are done."""
    rollback_steps: int = 100
    """Steps whose rows a rollback leaves out, the spike's step included; rows from before the checkpoint stay."""
    max_rollbacks: int = 10
    """Most rollbacks of the whole run; at the next spike it saves and stops with exit code 3."""

    def check(self) -> None:
        super().check()
        self.require_at_least(1, "max_skipped_steps", "spike_window_steps", "rollback_steps", "max_rollbacks")
        if not self.spike_factor > 1:
            raise BadInput(f"--spike_factor {self.spike_factor}: must be above 1, or half of all norms are spikes")


@dataclass(frozen=True)
class ShardingSettings(SettingsSlice):
    """How weights, gradients and optimizer state are sharded over ranks."""

    sharding_strategy: Literal["FULL_SHARD", "SHARD_GRAD_OP", "HYBRID_SHARD", "NO_SHARD"] = "FULL_SHARD"
    """FSDP's strategies: SHARD_GRAD_OP gathers weights once a step and keeps them until its last backward,
    HYBRID_SHARD shards inside groups of ranks, NO_SHARD replicates."""
    gradient_sync: Literal["step", "micro_batch"] = "step"
    """When ranks add up gradients: once a step, each rank holding whole fp32 gradients until then; or in each
    micro-batch, each rank holding its shard of them. For one rank, or one micro-batch a step, it is the same."""
    shard_group_size: int | None = None
    """Ranks that one copy of the weights is sharded over; only for HYBRID_SHARD. Default: the ranks of a node."""

    @property
    def reshards_after_forward(self) -> bool:
        """Whether a block's gathered weights are freed after forward, and gathered again for backward."""
        return self.sharding_strategy in ("FULL_SHARD", "HYBRID_SHARD")

    @property
    def has_copies(self) -> bool:
        """Whether the mesh has a dimension of copies of the weights."""
        return self.sharding_strategy in ("HYBRID_SHARD", "NO_SHARD")

    def shards(self, devices: int, world_size: int) -> int:
        """Number of ranks that one copy of the weights is sharded over; devices: ranks of a node.

        Raises BadInput if the groups of HYBRID_SHARD do not divide world_size.
        """
        if self.sharding_strategy == "NO_SHARD":
            return 1
        if self.sharding_strategy != "HYBRID_SHARD":
            return world_size
        group = self.shard_group_size or devices
        if world_size % group:
            valid = ", ".join(str(size) for size in range(1, world_size + 1) if world_size % size == 0)
            raise BadInput(f"--shard_group_size {group} does not divide {world_size} processes. Valid: {valid}")
        return group

    def share_of_node(self, devices: int, world_size: int) -> float:
        """Share of the weights that the ranks of a node hold together. Raises BadInput as `shards` does."""
        return min(1.0, devices / self.shards(devices, world_size))

    def mesh_shape(self, devices: int, world_size: int) -> dict[str, int]:
        """Dimensions of the mesh: how many copies of the weights there are, where there may be several, and over how
        many neighbouring ranks each is sharded. Raises BadInput as `shards` does."""
        shards = self.shards(devices, world_size)
        copies = {"replicate": world_size // shards} if self.has_copies else {}
        return {**copies, "shard": shards}

    def check(self) -> None:
        super().check()
        self.require_at_least(1, "shard_group_size")
        if self.shard_group_size is not None and self.sharding_strategy != "HYBRID_SHARD":
            raise BadInput(
                f"--shard_group_size {self.shard_group_size} with --sharding_strategy {self.sharding_strategy}: "
                "only HYBRID_SHARD has groups"
            )


@dataclass(frozen=True)
class TrackerSettings(SettingsSlice):
    """What is logged, and where to."""

    log_interval_steps: int = 10
    """Steps between lines of metrics; the last step always logs."""
    eval_interval_steps: int = 1000
    """Steps between validations; the last step always validates."""
    eval_max_rows: int | None = None
    """Rows of the validation split that a validation reads. Default: all."""
    profile_steps: str | None = None
    """A:B profiles steps A to B - 1 of rank 0 with torch.profiler; a trace, a table of kernels and a snapshot of GPU
    memory go to the run folder."""
    report: bool = True
    """Write report.html to the run folder at each save, by a process of its own beside the training."""
    tensorboard: bool = True
    """Write TensorBoard events to the run folder beside metrics.csv."""
    wandb: Literal["off", "online", "offline"] = "off"
    """Send metrics to Weights & Biases too; offline: into the run folder, for `wandb sync` to upload later."""
    wandb_project: str = "llammlein"
    """Weights & Biases project of the run."""
    wandb_name: str | None = None
    """Weights & Biases name of the run. Default: the run folder's name."""
    wandb_timeout_s: int = 30
    """Most seconds that the start, and the end, of a run wait for the Weights & Biases server."""

    def check(self) -> None:
        super().check()
        self.require_at_least(1, "log_interval_steps", "eval_interval_steps", "eval_max_rows", "wandb_timeout_s")
        if self.profile_steps is not None:
            step_range(self.profile_steps)


@dataclass(frozen=True)
class SamplingSettings(SettingsSlice):
    """Samples: texts that the model writes during the training."""

    sample_interval_steps: int = 0
    """Steps between samples, which go to samples.jsonl and TensorBoard; 0: none."""
    sample_prompts: list[str] = field(default_factory=lambda: ["Am Morgen", "Die Stadt Würzburg"])
    """Prompts; the model continues each of them."""
    sample_tokens: int = 64
    """Most tokens of a sample; each costs a forward pass."""
    sample_temperature: float = 0.0
    """0: always the likeliest token; above 0: drawn, reproducibly for the same seed, step and weights."""

    def check(self) -> None:
        super().check()
        self.require_at_least(1, "sample_tokens")
        self.require_not_negative("sample_interval_steps", "sample_temperature")
        if self.sample_interval_steps and not self.sample_prompts:
            raise BadInput("--sample_interval_steps without --sample_prompts: give at least one prompt")


@dataclass(frozen=True)
class PlanSettings(SettingsSlice):
    """The plan: what a run will need, computed before it starts."""

    plan: bool = False
    """Print what the run will need (GPU memory, tokens, time, disk) and exit; needs no GPU and no data. devices and
    num_nodes may exceed this machine's."""
    plan_gpu_gib: float = 78.5
    """GiB of GPU memory that PyTorch can allocate, for --plan. Default: an 80 GiB H100's, less CUDA's own."""
    plan_tokens_per_s: float | None = None
    """Tokens a second of one GPU, from which --plan computes the run's time."""
    plan_network_gb_per_s: float = 50.0
    """GB/s of the network port of each GPU, for --plan. Default: 400 Gbit/s."""
    plan_storage_gb_per_s: float = 1.0
    """GB/s at which a node writes checkpoints, for --plan."""
    plan_failures_per_gpu_day: float = 4.7e-4
    """Failures of a GPU a day that stop a run, for --plan. Default: Llama 3's 419 in 54 days of 16,384 GPUs
    (arXiv:2407.21783)."""
    plan_restart_s: float = 60.0
    """Seconds from a failure until the run trains again, for --plan."""
    plan_save_s: float = 2.0
    """Seconds that training waits for a save, for --plan."""

    def check(self) -> None:
        super().check()
        self.require_above(
            0, "plan_gpu_gib", "plan_tokens_per_s", "plan_network_gb_per_s", "plan_storage_gb_per_s",
            "plan_failures_per_gpu_day", "plan_save_s",
        )  # fmt: skip
        self.require_not_negative("plan_restart_s")


@dataclass(frozen=True)
class StepSettings(SpikeSettings, OptimizerSettings, ShardingSettings, LaunchSettings, DataSettings, ModelSettings):
    """What a training step depends on; the benchmarks of a step need no more."""


@dataclass(frozen=True)
class Settings(
    PlanSettings,
    WatchdogSettings,
    StopSettings,
    SamplingSettings,
    TrackerSettings,
    CheckpointSettings,
    DatapointSettings,
    StepSettings,
):
    """Settings of a run: the sum of the slices of its rooms."""

    def check(self) -> None:
        """Raise BadInput for values that are out of range or contradict each other, naming the value and the range."""
        super().check()
        if not self.train_sources and not self.plan:
            raise BadInput(
                "--train_data_dir is missing (and TRAIN_DATA_DIR in the environment): the folder DIR/train that "
                "scripts/prepare_data.py wrote; --help lists the flags"
            )


def without_recipe_limits(settings: Settings, flags: Collection[str]) -> Settings:
    """`settings` without the recipe's max_steps and max_tokens where the command line (`flags`: names) has a limit."""
    if not set(LIMITS) & set(flags):
        return settings
    return replace(
        settings,
        max_steps=settings.max_steps if "max_steps" in flags else None,
        max_tokens=settings.max_tokens if "max_tokens" in flags else None,
    )


def step_range(steps: str) -> tuple[int, int]:
    """(A, B) of --profile_steps "A:B"; raises BadInput unless both are whole numbers and A is below B."""
    first, _, end = steps.partition(":")
    if not (first.isdigit() and end.isdigit() and int(first) < int(end)):
        raise BadInput(f"--profile_steps {steps}: must be A:B with A below B, to trace steps A to B - 1")
    return int(first), int(end)
