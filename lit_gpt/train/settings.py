"""Settings of a training run: every knob, its unit and its default. No torch, so `--help` is instant.

A room owns the slice that it reads (lit_gpt/<room>/settings.py); a run's settings are their sum, flat. A function names
the narrowest slice that holds what it reads. Precedence: the defaults < YAML files (`--config`) < command line. `check`
refuses what can be refused without looking at data, devices or checkpoints; the rest is refused by the module that
owns it. What `auto` and None stand for is decided once, in train/resolve.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from lit_gpt.checkpoint.settings import CheckpointSettings
from lit_gpt.cli import BadInput, SettingsSlice
from lit_gpt.data.settings import DataSettings
from lit_gpt.datapoints.settings import DatapointSettings
from lit_gpt.launch.settings import LaunchSettings, StopSettings, WatchdogSettings
from lit_gpt.model.settings import ModelSettings


@dataclass(frozen=True)
class OptimizerSettings(SettingsSlice):
    """The optimizer and its schedule."""

    max_steps: int = 1_430_512
    """Optimizer updates of the whole run, resumed parts included."""
    learning_rate: float = 2.5e-4
    """Peak learning rate."""
    min_lr: float = 4e-6
    """Learning rate at max_steps."""
    warmup_steps: int = 2000
    """Steps of linear warm-up from 0 to learning_rate."""
    lr_schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """After warm-up: cosine to min_lr; wsd stays at the peak, then falls linearly over decay_steps; constant."""
    decay_steps: int = 0
    """Steps of the final decay; wsd only."""
    weight_decay: float = 0.1
    """AdamW's decoupled decay, on matrices only."""
    beta1: float = 0.9
    """AdamW's decay of the gradient average."""
    beta2: float = 0.95
    """AdamW's decay of the squared-gradient average."""
    grad_clip: float = 1.0
    """Global gradient norm above which gradients are scaled down; 0 turns clipping off."""

    def check(self) -> None:
        super().check()
        self.require_at_least(1, "max_steps")
        self.require_not_negative("warmup_steps", "decay_steps", "weight_decay", "grad_clip", "min_lr")
        self.require_above(0, "learning_rate")
        if self.min_lr > self.learning_rate:
            raise BadInput(
                f"--min_lr {self.min_lr} is above --learning_rate {self.learning_rate}: the schedule would rise "
                f"({self.lr_schedule}, {self.warmup_steps} steps of warm-up, {self.max_steps} in all)"
            )
        if (self.lr_schedule == "wsd") != (self.decay_steps > 0):
            raise BadInput(
                f"--decay_steps {self.decay_steps} with --lr_schedule {self.lr_schedule}: wsd needs it, no other"
            )
        if self.warmup_steps + self.decay_steps > self.max_steps:
            raise BadInput(
                f"--warmup_steps {self.warmup_steps} and --decay_steps {self.decay_steps} "
                f"do not fit in --max_steps {self.max_steps}"
            )
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise BadInput(f"--beta1 {self.beta1} --beta2 {self.beta2}: each must lie in [0, 1)")


@dataclass(frozen=True)
class SpikeSettings(SettingsSlice):
    """Updates that are skipped, and what follows a spike of the gradient norm."""

    max_skipped_steps: int = 10
    """Steps in a row whose update may be skipped (loss or gradients not finite, or a spike) before the run saves and
    stops with exit code 3."""
    spike_policy: Literal["none", "skip", "rollback"] = "none"
    """What happens at a gradient norm above spike_factor times the usual: nothing; the step's update is skipped; or the
    run goes back to its last checkpoint and leaves out the rows that led there (without one yet: as skip)."""
    spike_factor: float = 10.0
    """Times the median of recent norms above which a gradient norm is a spike."""
    spike_window_steps: int = 128
    """Applied updates that the median is of; nothing is a spike before half of them are done."""
    rollback_steps: int = 100
    """Steps whose rows a rollback leaves out, the spike's the last of them; none from before the checkpoint."""
    max_rollbacks: int = 10
    """Rollbacks of the whole run; at the next spike it saves and stops with exit code 3."""

    def check(self) -> None:
        super().check()
        self.require_at_least(1, "max_skipped_steps", "spike_window_steps", "rollback_steps", "max_rollbacks")
        if not self.spike_factor > 1:
            raise BadInput(f"--spike_factor {self.spike_factor}: must be above 1, which is the usual norm")


@dataclass(frozen=True)
class ShardingSettings(SettingsSlice):
    """Sharding: how weights, gradients and optimizer state are spread over processes."""

    sharding_strategy: Literal["FULL_SHARD", "SHARD_GRAD_OP", "HYBRID_SHARD", "NO_SHARD"] = "FULL_SHARD"
    """How weights, gradients and optimizer state are spread over ranks; HYBRID_SHARD shards inside a group."""
    shard_group_size: int | None = None
    """Processes that share one copy of the weights; HYBRID_SHARD only. Default: those of a node."""

    @property
    def keeps_weights_whole(self) -> bool:
        """Whether a rank keeps gathered weights between forward and backward."""
        return self.sharding_strategy in ("SHARD_GRAD_OP", "NO_SHARD")

    def shards(self, devices: int, world_size: int) -> int:
        """Parts that one copy of the weights is cut into, of world_size processes with `devices` a node."""
        if self.sharding_strategy == "NO_SHARD":
            return 1
        if self.sharding_strategy != "HYBRID_SHARD":
            return world_size
        group = self.shard_group_size or devices
        if world_size % group:
            valid = ", ".join(str(size) for size in range(1, world_size + 1) if world_size % size == 0)
            raise BadInput(f"--shard_group_size {group} does not divide {world_size} processes. Valid: {valid}")
        return group

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
    """Steps between lines of metrics."""
    eval_interval_steps: int = 1000
    """Steps between validations; the last step always validates."""
    eval_max_rows: int | None = None
    """Rows of the validation split that a validation reads. Default: all."""
    profile_steps: str | None = None
    """A:B traces steps A to B - 1 by torch.profiler into the run folder, rank 0's, with a snapshot of GPU memory."""
    tensorboard: bool = True
    """Write TensorBoard events to the run folder beside metrics.csv."""
    wandb: Literal["off", "online", "offline"] = "off"
    """Weights & Biases beside metrics.csv; offline: into the run folder, to be uploaded later by `wandb sync`."""
    wandb_project: str = "llammlein"
    """Project of Weights & Biases that the run appears in."""
    wandb_name: str | None = None
    """Name of the run there. Default: the run folder's name."""
    wandb_timeout_s: int = 30
    """Seconds that the start and the end of a run wait for the server of Weights & Biases."""

    def check(self) -> None:
        super().check()
        self.require_at_least(1, "log_interval_steps", "eval_interval_steps", "eval_max_rows", "wandb_timeout_s")
        if self.profile_steps is not None:
            step_range(self.profile_steps)


@dataclass(frozen=True)
class SamplingSettings(SettingsSlice):
    """Texts that the running model writes."""

    sample_interval_steps: int = 0
    """Steps between texts that the model writes, to samples.jsonl and TensorBoard; 0 writes none."""
    sample_prompts: list[str] = field(default_factory=lambda: ["Am Morgen", "Die Stadt Würzburg"])
    """What the model continues."""
    sample_tokens: int = 64
    """Tokens of a continuation at most; each costs a forward pass."""
    sample_temperature: float = 0.0
    """0: always the likeliest token; above: drawn, the same text for the same seed, step and weights."""

    def check(self) -> None:
        super().check()
        self.require_at_least(1, "sample_tokens")
        self.require_not_negative("sample_interval_steps", "sample_temperature")
        if self.sample_interval_steps and not self.sample_prompts:
            raise BadInput("--sample_interval_steps without --sample_prompts: name at least one beginning of a text")


@dataclass(frozen=True)
class PlanSettings(SettingsSlice):
    """The plan: what a run will need, told before it starts."""

    plan: bool = False
    """Print what the run will need (memory of a GPU, tokens, time, disk) and end; needs no GPU and no data. devices and
    num_nodes may exceed this machine's."""
    plan_gpu_gib: float = 78.5
    """GiB of a GPU that PyTorch can have, for --plan: an 80-GiB H100's, without CUDA's own."""
    plan_tokens_per_s: float | None = None
    """Tokens a second of one GPU from which --plan tells the run's time."""

    def check(self) -> None:
        super().check()
        self.require_above(0, "plan_gpu_gib", "plan_tokens_per_s")


@dataclass(frozen=True)
class StepSettings(SpikeSettings, OptimizerSettings, ShardingSettings, LaunchSettings, DataSettings, ModelSettings):
    """What a training step depends on; all that --plan and the benchmarks of a step need."""


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
    """Settings of a run: the sum of what its rooms read."""

    def check(self) -> None:
        """Refuse values that contradict themselves or each other; raises BadInput naming the value and the range."""
        super().check()
        if not self.train_sources and not self.plan:
            raise BadInput("--train_data_dir is missing: the folder DIR/train that scripts/prepare_data.py wrote")


def step_range(steps: str) -> tuple[int, int]:
    """(A, B) of --profile_steps "A:B"; raises BadInput for anything but two whole numbers with A below B."""
    first, _, end = steps.partition(":")
    if not (first.isdigit() and end.isdigit() and int(first) < int(end)):
        raise BadInput(f"--profile_steps {steps}: must be A:B with A below B, to trace steps A to B - 1")
    return int(first), int(end)
