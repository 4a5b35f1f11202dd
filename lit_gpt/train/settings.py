"""Settings of a training run: every knob, its unit and its default. No torch, so `--help` is instant.

Precedence: the defaults here < YAML files (`--config`) < command line. `check` refuses what can be refused without
looking at data, devices or checkpoints; the rest is refused by the module that owns it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from lit_gpt.cli import BadInput
from lit_gpt.config import Config


@dataclass(frozen=True)
class Settings:
    """Settings of a run."""

    model_name: str = "LLaMmlein_1B"
    """Shape of the model: a name from the registry in lit_gpt/config.py."""
    vocab_size: int | None = None
    """Ids of the tokenizer, if not the model's published vocabulary."""
    block_size: int | None = None
    """Tokens a row, if not the model's own."""

    train_data_dir: str | list[str] | None = None
    """Folder with the training split that scripts/prepare_data.py wrote (required); of a mixture, a list of folders,
    each as DIR or DIR:WEIGHT. Without weights a source counts by its size."""
    val_data_dir: str | None = None
    """Folder with the validation split; without it nothing is validated."""
    tokenizer_path: str | None = None
    """Tokenizer folder; its fingerprint must be the one that the data was made with. Exports copy it."""
    packing: Literal["window", "bestfit", "pad"] = "window"
    """Rows from documents: consecutive windows; documents whole where they fit; or one document a row, padded."""
    cross_document_attention: bool = False
    """Let tokens attend across document boundaries inside a row, as TinyLlama and nanochat do."""
    allow_changed_data: bool = False
    """Go on although the data, its order or the batch differ from those that the run began with."""
    max_epochs: int = 1
    """Passes over the training split before the run stops, whatever max_steps says."""

    cache_dir: str | None = None
    """Folder on the node's own disk or in memory where the shards that are read now and next are staged, verified."""
    cache_bytes: int = 20_000_000_000
    """Most bytes in cache_dir; two pools of 64 shards of the default size are 17 GB."""

    out_dir: str | None = None
    """Run folder. Default: $MODEL_NAME if set, else out/<model_name>."""
    resume: str | None = None
    """A checkpoint to go on from, or "auto": the newest whole one of what the run folder trained last, or a fresh start
    in an empty one."""

    global_batch_size: int = 1024
    """Rows per step, over all ranks."""
    micro_batch_size: int = 8
    """Rows per rank per forward pass; does not change the result."""
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
    seed: int = 3407
    """Seed of the initial weights and of the data order."""

    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    """Kind of device; auto takes CUDA where there is one."""
    devices: int | None = None
    """Processes a node, one a device. Default: all GPUs of the node, or 1 on CPUs."""
    num_nodes: int = 1
    """Nodes of the run."""
    precision: Literal["32-true", "bf16-mixed", "bf16-true"] = "bf16-mixed"
    """bf16-mixed: fp32 weights and optimizer, bf16 computation; bf16-true: weights and optimizer in bf16 as well,
    for less memory; weights are rounded at random, so that small updates are not lost."""
    sharding_strategy: Literal["FULL_SHARD", "SHARD_GRAD_OP", "HYBRID_SHARD", "NO_SHARD"] = "FULL_SHARD"
    """How weights, gradients and optimizer state are spread over ranks; HYBRID_SHARD shards inside a group."""
    shard_group_size: int | None = None
    """Processes that share one copy of the weights; HYBRID_SHARD only. Default: those of a node."""
    state_dict_type: Literal["auto", "sharded", "full"] = "auto"
    """Checkpoints: each rank writes its part, or rank 0 one state.pth. auto: full on one process, else sharded."""
    attention: Literal["auto", "fa3", "fa4", "fa2", "xformers", "torch"] = "auto"
    """Attention kernel; auto takes the fastest that the device and the installed packages allow, and logs it."""
    mlp: Literal["auto", "quack", "torch"] = "auto"
    """Who computes the MLP and the sums with the residual: quack inside its products, or torch step by step. auto:
    quack on Hopper GPUs that have it."""
    compile: bool | None = None
    """torch.compile each block and the loss. Default: on GPUs."""
    float8: Literal["none", "tensorwise", "rowwise"] = "none"
    """Products of matrices of the blocks in 8 bits, with one scale a tensor, for speed, or (torchao's) a row, which
    keeps more digits and was slower than bf16; not with 32-true."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """What blocks compute again for the backward pass, to save memory. selective: all but products of matrices and
    attention; full: everything but each block's input."""
    deterministic: bool = False
    """Only kernels that give the same bits each time: exact repetition on GPUs too, at a price in speed."""

    log_interval_steps: int = 10
    """Steps between lines of metrics."""
    save_interval_steps: int = 10_000
    """Steps between checkpoints; the last step and a stop signal always save."""
    keep_last_checkpoints: int = 2
    """Newest checkpoints that stay when a new one is whole; 0 keeps all."""
    keep_every_steps: int = 0
    """Checkpoints of steps that are a multiple of this stay for ever; 0: none does."""
    async_save: bool | None = None
    """Write checkpoints beside the training, from a copy of the state in host memory; the last one is waited for.
    Default: on GPUs; on CPUs both would compete for the same cores."""
    eval_interval_steps: int = 1000
    """Steps between validations; the last step always validates."""
    eval_max_rows: int | None = None
    """Rows of the validation split that a validation reads. Default: all."""
    profile_steps: str | None = None
    """A:B traces steps A to B - 1 by torch.profiler into the run folder, rank 0's, with a snapshot of GPU memory."""
    sample_interval_steps: int = 0
    """Steps between texts that the model writes, to samples.jsonl and TensorBoard; 0 writes none."""
    sample_prompts: list[str] = field(default_factory=lambda: ["Am Morgen", "Die Stadt Würzburg"])
    """What the model continues."""
    sample_tokens: int = 64
    """Tokens of a continuation at most; each costs a forward pass."""
    sample_temperature: float = 0.0
    """0: always the likeliest token; above: drawn, the same text for the same seed, step and weights."""
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

    time_limit_s: float | None = None
    """Seconds after which the run saves and stops, counted from its start; a Slurm job also knows its own end."""
    stop_margin_s: float = 60
    """Seconds kept free before the job's end, beside twice the longest save and step."""
    watchdog_factor: float = 10
    """A step that takes this many times the usual ends the run with the stacks of all ranks; 0 turns that off."""
    watchdog_floor_s: float = 300
    """Seconds that every step may take, whatever the usual is."""
    watchdog_long_s: float = 1800
    """Seconds that the set-up, the first two steps (they compile), a validation or a save may take."""

    plan: bool = False
    """Print what the run will need (memory of a GPU, tokens, time, disk) and end; needs no GPU and no data. devices and
    num_nodes may exceed this machine's."""
    plan_gpu_gib: float = 78.5
    """GiB of a GPU that PyTorch can have, for --plan: an 80-GiB H100's, without CUDA's own."""
    plan_tokens_per_s: float | None = None
    """Tokens a second of one GPU from which --plan tells the run's time."""

    @property
    def train_sources(self) -> list[str]:
        """The training data as a list."""
        names = self.train_data_dir or []
        return [names] if isinstance(names, str) else names

    @property
    def config(self) -> Config:
        """Shape of the model, with the vocabulary and the rows that the settings ask for."""
        overrides = {name: getattr(self, name) for name in ("block_size", "vocab_size") if getattr(self, name)}
        return Config.from_name(self.model_name, **overrides)

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
        """Refuse values that contradict themselves or each other; raises BadInput naming the value and the range."""
        Config.from_name(self.model_name)
        at_least_one = (
            "global_batch_size micro_batch_size max_steps max_epochs num_nodes log_interval_steps "
            "save_interval_steps eval_interval_steps cache_bytes max_skipped_steps spike_window_steps "
            "rollback_steps max_rollbacks wandb_timeout_s sample_tokens"
        )
        for name in at_least_one.split():
            if getattr(self, name) < 1:
                raise BadInput(f"--{name} {getattr(self, name)}: must be at least 1")
        for name in ("devices", "eval_max_rows", "vocab_size", "block_size", "shard_group_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise BadInput(f"--{name} {value}: must be at least 1")
        for name in ("time_limit_s", "watchdog_floor_s", "watchdog_long_s"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise BadInput(f"--{name} {value}: must be above 0")
        not_negative = (
            "warmup_steps decay_steps keep_last_checkpoints keep_every_steps weight_decay grad_clip min_lr "
            "stop_margin_s watchdog_factor sample_interval_steps sample_temperature"
        )
        for name in not_negative.split():
            if not getattr(self, name) >= 0:
                raise BadInput(f"--{name} {getattr(self, name)}: must not be negative")
        if not self.spike_factor > 1:
            raise BadInput(f"--spike_factor {self.spike_factor}: must be above 1, which is the usual norm")
        if not self.learning_rate > 0:
            raise BadInput(f"--learning_rate {self.learning_rate}: must be above 0")
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
        if self.shard_group_size is not None and self.sharding_strategy != "HYBRID_SHARD":
            raise BadInput(
                f"--shard_group_size {self.shard_group_size} with --sharding_strategy {self.sharding_strategy}: "
                "only HYBRID_SHARD has groups"
            )
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise BadInput(f"--beta1 {self.beta1} --beta2 {self.beta2}: each must lie in [0, 1)")
        if self.sample_interval_steps and not self.sample_prompts:
            raise BadInput("--sample_interval_steps without --sample_prompts: name at least one beginning of a text")
        if self.profile_steps is not None:
            step_range(self.profile_steps)
        if self.float8 != "none" and self.precision == "32-true":
            raise BadInput(f"--float8 {self.float8} with --precision 32-true. Valid with it: bf16-mixed, bf16-true")
        if self.float8 != "none" and self.mlp == "quack":
            raise BadInput(f"--float8 {self.float8} with --mlp quack, which has no 8 bits. Valid with it: auto, torch")
        if not self.plan_gpu_gib > 0:
            raise BadInput(f"--plan_gpu_gib {self.plan_gpu_gib}: must be above 0")
        if self.plan_tokens_per_s is not None and not self.plan_tokens_per_s > 0:
            raise BadInput(f"--plan_tokens_per_s {self.plan_tokens_per_s}: must be above 0")
        if not self.train_sources and not self.plan:
            raise BadInput("--train_data_dir is missing: the folder DIR/train that scripts/prepare_data.py wrote")


def step_range(steps: str) -> tuple[int, int]:
    """(A, B) of --profile_steps "A:B"; raises BadInput for anything but two whole numbers with A below B."""
    first, _, end = steps.partition(":")
    if not (first.isdigit() and end.isdigit() and int(first) < int(end)):
        raise BadInput(f"--profile_steps {steps}: must be A:B with A below B, to trace steps A to B - 1")
    return int(first), int(end)
