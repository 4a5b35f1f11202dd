"""Every setting of a run, changed at a resume: what must be refused, what must take effect, and how that is seen.

tests/support/settings_walk.py runs the cases.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BASE: dict[str, Any] = dict(
    model_name="debug", block_size=64, precision="32-true", accelerator="cpu", global_batch_size=8, micro_batch_size=4,
    max_steps=8, learning_rate=3e-3, min_lr=3e-4, warmup_steps=3, log_interval_steps=1, eval_interval_steps=4,
    save_interval_steps=4, state_dict_type="full", tensorboard=False, report=False, wandb="offline",
    spike_policy="skip", spike_factor=1000.0, sample_interval_steps=4, sample_prompts=["ein"], sample_tokens=3,
    watchdog_floor_s=400.0, train_data_dir="ROOT/train", val_data_dir="ROOT/val", tokenizer_path="ROOT/tokenizer",
)  # fmt: skip
"""ROOT stands for the folder of the walk."""


@dataclass(frozen=True)
class Seen:
    """What a training showed, from step 4 on."""

    probes: list[dict[str, Any]]
    """What the objects of each rank held, and what went through them."""
    rows: list[dict[str, str]]
    """The lines of metrics.csv."""
    log: list[str]
    """What rank 0 logged."""
    run: Path

    def logged(self, name: str) -> list[int]:
        """The steps whose line has this column."""
        return [int(row["step"]) for row in self.rows if row[name]]

    def numbers(self, name: str) -> list[float]:
        return [float(row[name]) for row in self.rows]

    def samples(self) -> list[dict[str, Any]]:
        lines = (self.run / "samples.jsonl").read_text().splitlines() if (self.run / "samples.jsonl").exists() else []
        return [sample for sample in map(json.loads, lines) if sample["step"] > 4]

    def saved(self) -> list[int]:
        """The steps of the checkpoints that were saved."""
        return [int(line.split("iter-")[1][:8]) for line in self.log if line.startswith("saved ")]

    def kept(self) -> list[str]:
        return sorted(path.name[5:13].lstrip("0") for path in self.run.glob("iter-*"))


@dataclass(frozen=True)
class Case:
    """A change of settings at a resume."""

    change: dict[str, Any]
    seen: Callable[[Seen], Any] | None = None
    """What shows the effect; None: there is none, for the reason that the table gives."""
    was: Any = None
    """What `seen` gives without the change."""
    now: Any = None
    refused: str | None = None
    """What the one line says, as a regular expression; then nothing starts."""
    start: dict[str, Any] = field(default_factory=dict)
    """Settings of this start alone, which no record holds."""


def probe(name: str) -> Callable[[Seen], Any]:
    """The value that all ranks have."""

    def look(seen: Seen) -> Any:
        first, *others = (found[name] for found in seen.probes)
        assert all(other == first for other in others), name
        return first

    return look


def rates(seen: Seen) -> list[float]:
    return [round(value, 9) for value in seen.numbers("learning_rate")]


def batches(seen: Seen) -> list[Any]:
    """[[micro-batches of a step, rows, tokens a row]], and whether backward passes reduce gradients over ranks."""
    return [probe("micro_batches")(seen), probe("reduces")(seen)]


def rows_of_a_step(seen: Seen) -> int:
    lines = (seen.run / "datapoints" / "steps.jsonl").read_text().splitlines()
    return int(json.loads(lines[-1])["rows"])


UNCHANGED = [0.002604594, 0.00165, 0.000695406, 0.0003]
"""Rates of steps 5 to 8: 3e-4 + 2.7e-3 (1 + cos(pi p)) / 2 with p = 1/4, 1/2, 3/4, 1."""
DATA = r"the data has changed since .*{}.*--new_data true .*--allow_changed_data true"
GO_ON = {"allow_changed_data": True}

CASES: dict[str, Case] = {
    # the plan: --plan prints and ends; a run does not read the others
    "plan": Case({}),
    "plan_gpu_gib": Case({"plan_gpu_gib": 40.0}),
    "plan_tokens_per_s": Case({"plan_tokens_per_s": 1e4}),
    "plan_network_gb_per_s": Case({"plan_network_gb_per_s": 1e4}),
    "plan_storage_gb_per_s": Case({"plan_storage_gb_per_s": 1e4}),
    "plan_failures_per_gpu_day": Case({"plan_failures_per_gpu_day": 1e4}),
    "plan_restart_s": Case({"plan_restart_s": 1e4}),
    "plan_save_s": Case({"plan_save_s": 1e4}),
    # the watchdog
    "watchdog_factor": Case({"watchdog_factor": 20.0}, probe("stall_of_long_steps_s"), 10_000.0, 20_000.0),
    "watchdog_floor_s": Case({"watchdog_floor_s": 500.0}, probe("stall_of_short_steps_s"), 400.0, 500.0),
    "watchdog_long_s": Case({"watchdog_long_s": 900.0}, probe("stall_of_saves_s"), 1800.0, 900.0),
    "silent_rank_s": Case({"silent_rank_s": 50.0}, probe("silent_rank_s"), [25.0], [50.0]),
    # the end of a job
    "time_limit_s": Case({"time_limit_s": 5000.0}, probe("time_limit_s"), None, 5000),
    "stop_margin_s": Case({"stop_margin_s": 7.0}, probe("margin_s"), 60.0, 7.0),
    # samples
    "sample_interval_steps": Case(
        {"sample_interval_steps": 3}, lambda seen: [sample["step"] for sample in seen.samples()], [8], [6]
    ),
    "sample_prompts": Case(
        {"sample_prompts": ["zwei", "drei"]},
        lambda seen: [sample["prompt"] for sample in seen.samples()],
        ["ein"],
        ["zwei", "drei"],
    ),
    "sample_tokens": Case({"sample_tokens": 5}, probe("sampled_tokens"), 3, 5),
    "sample_temperature": Case({"sample_temperature": 0.7}, probe("temperatures"), [0.0], [0.7]),
    # trackers
    "log_interval_steps": Case({"log_interval_steps": 3}, lambda seen: seen.logged("loss"), [5, 6, 7, 8], [6, 8]),
    "eval_interval_steps": Case({"eval_interval_steps": 3}, lambda seen: seen.logged("val_loss"), [8], [6, 8]),
    "eval_max_rows": Case({"eval_max_rows": 9}, probe("validation_batches"), 3, 2),
    "profile_steps": Case({"profile_steps": "6:7"}, lambda seen: len(list(seen.run.glob("profile/steps-6-7.*"))), 0, 2),
    "tensorboard": Case({"tensorboard": True}, lambda seen: (seen.run / "tensorboard").is_dir(), False, True),
    "report": Case({"report": True}, lambda seen: (seen.run / "report.html").is_file(), False, True),
    "wandb": Case({"wandb": "online"}, lambda seen: seen.probes[0]["wandb"]["mode"], "offline", "online"),
    "wandb_project": Case(
        {"wandb_project": "other"},
        lambda seen: [seen.probes[0]["wandb"][name] for name in ("project", "logged")],
        ["llammlein", []],
        ["other", [1, 2, 3, 4, 5, 6, 7, 8]],
    ),
    "wandb_name": Case({"wandb_name": "x"}, lambda seen: seen.probes[0]["wandb"]["name"], "run", "x"),
    "wandb_timeout_s": Case(
        {"wandb_timeout_s": 5}, lambda seen: seen.probes[0]["wandb"]["settings"]["init_timeout"], 30, 5
    ),
    # checkpoints
    "resume": Case({}),  # of one start
    "save_interval_steps": Case({"save_interval_steps": 3}, Seen.saved, [8], [6, 8]),
    "keep_last_checkpoints": Case({"keep_last_checkpoints": 1}, Seen.kept, ["4", "8"], ["8"]),
    "keep_every_steps": Case({"save_interval_steps": 1, "keep_every_steps": 3}, Seen.kept, ["4", "8"], ["6", "7", "8"]),
    "state_dict_type": Case(
        {"state_dict_type": "sharded"}, lambda seen: (seen.run / "iter-00000008-ckpt.pth/state").is_dir(), False, True
    ),
    "memory_checkpoint_dir": Case(
        {"memory_checkpoint_dir": "ROOT/memory", "memory_checkpoint_steps": 1}, Seen.saved, [8], [5, 6, 7, 8]
    ),
    "memory_checkpoint_steps": Case(
        {"memory_checkpoint_dir": "ROOT/memory", "memory_checkpoint_steps": 3}, Seen.saved, [8], [6, 8]
    ),
    "async_save": Case({"async_save": True}, probe("saves_beside_training"), False, True),
    # the run folder
    "out_dir": Case({"out_dir": "ROOT/elsewhere"}, lambda seen: seen.run.name, "run", "elsewhere"),
    "allow_changed_data": Case({}),  # of one start; with the data below
    "new_data": Case({}),  # likewise
    # skipped updates
    "max_skipped_steps": Case({"max_skipped_steps": 3}, probe("max_skipped"), 10, 3),
    "spike_policy": Case({"spike_policy": "rollback"}, probe("rolls_back"), False, True),
    "spike_factor": Case({"spike_factor": 50.0}, probe("spike_factor"), 1000.0, 50.0),
    "spike_window_steps": Case({"spike_window_steps": 9}, probe("spike_window"), 128, 9),
    "rollback_steps": Case({"rollback_steps": 2}, probe("rollback_rows"), 800, 16),
    "max_rollbacks": Case({"max_rollbacks": 1}, probe("most_rollbacks"), 10, 1),
    # the optimizer; the weights are compared with PyTorch's AdamW besides
    "max_steps": Case({"max_steps": 7}, rates, UNCHANGED, [0.002325, 0.000975, 0.0003]),  # p = 1/3, 2/3, 1
    "max_tokens": Case({"max_tokens": 7 * 512 + 9}, rates, UNCHANGED, [0.002325, 0.000975, 0.0003]),
    "learning_rate": Case({"learning_rate": 1e-2}, rates, UNCHANGED, [0.008579468, 0.00515, 0.001720532, 0.0003]),
    "min_lr": Case({"min_lr": 1e-3}, rates, UNCHANGED, [0.002707107, 0.002, 0.001292893, 0.001]),
    "warmup_steps": Case({"warmup_steps": 5}, rates, UNCHANGED, [0.003, 0.003, 0.00165, 0.0003]),
    "lr_schedule": Case({"lr_schedule": "constant"}, rates, UNCHANGED, [0.003] * 4),
    "decay_steps": Case({"lr_schedule": "wsd", "decay_steps": 3}, rates, UNCHANGED, [0.003, 0.0021, 0.0012, 0.0003]),
    "weight_decay": Case({"weight_decay": 20.0}, probe("weight_decay"), [0.1, 0.0], [20.0, 0.0]),
    "beta1": Case({"beta1": 0.5}, probe("betas"), [[0.9, 0.95]], [[0.5, 0.95]]),
    "beta2": Case({"beta2": 0.5}, probe("betas"), [[0.9, 0.95]], [[0.9, 0.5]]),
    "grad_clip": Case({"grad_clip": 0.01}, probe("clips_to"), [1.0], [0.01]),
    "optimizer": Case({"optimizer": "muon"}, refused="was trained by adamw, whose state muon cannot take"),
    "muon_momentum": Case({"muon_momentum": 0.9}, refused="--muon_momentum 0.9 with --optimizer adamw"),
    "muon_cautious_weight_decay": Case(
        {"muon_cautious_weight_decay": True}, refused="--muon_cautious_weight_decay True with --optimizer adamw"
    ),
    # sharding: [shape of the mesh, whether weights are freed after the forward pass]
    "sharding_strategy": Case({"sharding_strategy": "SHARD_GRAD_OP"}, probe("sharding"), [[2], True], [[2], False]),
    "shard_group_size": Case(
        {"sharding_strategy": "HYBRID_SHARD", "shard_group_size": 1}, probe("sharding"), [[2], True], [[2, 1], True]
    ),
    "gradient_sync": Case(
        {"micro_batch_size": 2, "gradient_sync": "micro_batch"},
        batches,
        [[[1, 4, 64]], [True]],
        [[[2, 2, 64]], [True]],
    ),
    # processes
    "accelerator": Case({"accelerator": "cuda"}, refused="--accelerator cuda: no CUDA device is visible. Valid"),
    "devices": Case({"devices": 1}, refused="--devices 1, but the launcher started 2 processes"),
    "num_nodes": Case({"num_nodes": 2}, refused="--num_nodes 2, but the launcher runs on 1 nodes"),
    "deterministic": Case({"deterministic": True}, probe("deterministic"), False, True),
    # data
    "train_data_dir": Case({"train_data_dir": "ROOT/other"}, refused=DATA.format("datasets was")),
    "val_data_dir": Case({"val_data_dir": "ROOT/other"}, probe("validation_batches"), 3, 6),
    "tokenizer_path": Case({"tokenizer_path": "ROOT/copied"}, probe("prompt_ids"), [[70, 74, 79]], [[70, 74, 79]]),
    "packing": Case({"packing": "pad"}, refused=DATA.format("packing was window and is pad")),
    "cross_document_attention": Case(
        {"cross_document_attention": True}, refused=DATA.format("cross_document_attention was False and is True")
    ),
    "max_epochs": Case({"max_epochs": 3}, probe("last_step_of_the_data"), 16, 49),
    "seed": Case({"seed": 7}, refused=DATA.format("seed was 3407 and is 7")),
    "global_batch_size": Case({"global_batch_size": 16}, refused=DATA.format("global_batch_size was 8 and is 16")),
    "micro_batch_size": Case({"micro_batch_size": 2}, batches, [[[1, 4, 64]], [True]], [[[2, 2, 64]], [False, True]]),
    "cache_dir": Case({"cache_dir": "ROOT/cache"}, probe("cache"), None, ["ROOT/cache", 20_000_000_000]),
    "cache_bytes": Case({"cache_dir": "ROOT/cache", "cache_bytes": 10**9}, probe("cache"), None, ["ROOT/cache", 10**9]),
    # the model
    "model_name": Case({"model_name": "LLaMmlein_120M"}, refused="model LLaMmlein_120M one of 32010: prepare"),
    "vocab_size": Case({"vocab_size": 100}, refused="--vocab_size 100, but the data has a vocabulary of 300"),
    "block_size": Case({"block_size": 32}, refused="another model: block_size is 64 there, 32 here"),
    "precision": Case(
        {"precision": "bf16-true"},
        probe("dtypes"),
        ["torch.float32", "torch.float32", "torch.float32"],
        ["torch.bfloat16", "torch.bfloat16", "torch.bfloat16"],
    ),
    "attention": Case({"attention": "fa3"}, refused="--attention fa3"),
    "mlp": Case({"mlp": "quack"}, refused="--mlp quack"),
    "compile": Case({"compile": True}, probe("compiled"), False, True),
    "float8": Case({"precision": "bf16-mixed", "float8": "tensorwise"}, probe("linear"), "Linear", "Float8Linear"),
    "activation_checkpointing": Case({"activation_checkpointing": "full"}, probe("forward_passes"), [1], [2]),
}
"""By the setting that it is about."""
FURTHER: dict[str, Case] = {
    "base": Case({}),  # the run that the others resume from its step 4
    "unchanged": Case({}),
    "schedule": Case(
        {"lr_schedule": "wsd", "decay_steps": 3, "weight_decay": 20.0, "beta1": 0.5, "beta2": 0.5, "grad_clip": 0.01},
        rates,
        UNCHANGED,
        [0.003, 0.0021, 0.0012, 0.0003],
    ),
    "bf16-mixed": Case(
        {"precision": "bf16-mixed"},
        probe("dtypes"),
        ["torch.float32", "torch.float32", "torch.float32"],
        ["torch.float32", "torch.float32", "torch.bfloat16"],
    ),
    "replicated": Case({"sharding_strategy": "NO_SHARD"}, probe("sharding"), [[2], True], [[2, 1], False]),
    "any accelerator": Case({"accelerator": "auto"}, probe("sharding"), [[2], True], [[2], True]),
    "batch, going on": Case({"global_batch_size": 16}, rows_of_a_step, 8, 16, start=GO_ON),
    "no spikes": Case({"spike_policy": "none"}, probe("spike_factor"), 1000.0, None),
}


def filled(values: dict[str, Any], root: Path) -> dict[str, Any]:
    """The values, with the folder of the walk in place of ROOT."""
    return {n: v.replace("ROOT", str(root)) if isinstance(v, str) else v for n, v in values.items()}
