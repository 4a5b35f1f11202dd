"""What a person means by a setting's value, or by its name: one reading for flags, YAML files and the environment.

A value is read from its text by the type of its setting. So `off` is not False where a setting has the choice "off",
and `1e-3` is a number (YAML 1.1 says otherwise in both cases). A misspelt name is refused; the names that it may stand
for are found by the words in it, by SYNONYMS and by spelling.
"""

from __future__ import annotations

import difflib
import os
import re
import types
from collections.abc import Callable, Collection, Sequence
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, Union, get_args, get_origin

ON, OFF = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
UNSET = ("null", "none")
"""Stand for None, where a setting may be unset."""
LARGEST_EXPONENT = 18
CLOSE, NEAREST = 0.65, 0.9
"""Similarity, by difflib, of names worth a suggestion, and of one that leaves no room for others."""

PathText: TypeAlias = Annotated[str, "path"]
"""Type of a setting that names a file or folder: a leading ~ and $VARIABLES are expanded."""

SYNONYMS = {
    "learning_rate": "lr max_lr peak_lr base_lr",
    "min_lr": "min_learning_rate lr_min final_lr end_lr lr_end",
    "max_steps": "steps iters max_iters train_iters total_steps num_steps max_train_steps num_train_steps n_steps",
    "max_tokens": "train_tokens total_tokens num_tokens token_budget",
    "max_epochs": "epochs num_epochs num_train_epochs train_epochs n_epochs",
    "warmup_steps": "warmup_iters lr_warmup_iters num_warmup_steps",
    "lr_schedule": "scheduler lr_scheduler lr_scheduler_type lr_decay_style schedule",
    "decay_steps": "cooldown cooldown_steps lr_decay_iters wsd_decay_steps",
    "weight_decay": "wd adam_weight_decay",
    "beta1": "adam_beta1", "beta2": "adam_beta2",
    "grad_clip": "clip_grad clip max_grad_norm gradient_clip_val gradient_clipping max_norm clip_norm",
    "global_batch_size": "gradient_accumulation_steps grad_accum gradient_accumulation total_batch_size bs",
    "micro_batch_size": "per_device_train_batch_size device_batch_size local_batch_size mbs bs",
    "block_size": "seq_length seq_len sequence_length max_seq_length max_seq_len context_length ctx_len context",
    "model_name": "model arch model_type size",
    "train_data_dir": "data data_path data_dir dataset datasets train_dir train_path",
    "val_data_dir": "val valid_data eval_data validation_data val_dir val_path valid_data_dir",
    "out_dir": "output output_dir save save_dir run_dir checkpoint_dir save_path exp_dir dump_dir o",
    "resume": "resume_from resume_from_checkpoint load load_checkpoint load_dir ckpt ckpt_path checkpoint restart",
    "devices": "gpus num_gpus n_gpus nproc_per_node num_processes world_size",
    "num_nodes": "nnodes nodes num_machines",
    "precision": "dtype bf16 fp16 fp32 amp mixed_precision",
    "attention": "attn attn_implementation flash_attention use_flash_attn sdpa",
    "activation_checkpointing": "gradient_checkpointing grad_checkpointing recompute ac remat",
    "sharding_strategy": "strategy fsdp sharding parallelism zero_stage zero",
    "float8": "fp8",
    "log_interval_steps": "log_every logging_steps log_interval log_freq log_steps",
    "save_interval_steps": "save_every save_steps save_interval save_freq checkpoint_interval checkpoint_every",
    "eval_interval_steps": "eval_every eval_steps eval_interval val_interval val_check_interval eval_freq",
    "eval_max_rows": "eval_iters eval_batches limit_val_batches",
    "keep_last_checkpoints": "save_total_limit keep_last keep_latest_k",
    "wandb": "report_to logger use_wandb", "wandb_name": "run_name name exp_name experiment",
    "time_limit_s": "timeout max_time time_limit",
    "seed": "random_seed rng_seed",
    "destination_path": "output output_dir out out_dir dest destination save_path output_path o",
    "source": "input inputs input_path data data_dir files file corpus",
    "tokenizer_path": "tokenizer vocab tokenizer_name tokenizer_dir",
    "vocab_size": "vocabulary vocabulary_size n_vocab",
    "workers": "num_workers num_proc processes jobs j",
    "max_new_tokens": "max_length n_tokens",
    "checkpoint": "ckpt model checkpoint_path checkpoint_dir",
    "run_dir": "run out_dir run_path folder",
    "cuda": "gpu gpus nvidia",
    "val_fraction": "val_split test_size validation_fraction val_ratio",
}  # fmt: skip
"""Name or choice here -> names of the same thing in other frameworks and programs."""


def read_value(kind: Any, given: str | Sequence[str]) -> Any:
    """The value of type `kind` that was written as `given`: a word, or the words of a list.

    kind: int, float, bool, str, PathText, a Literal of words, a list of str or PathText, or a union of these with None.
    Raises ValueError with the rest of a sentence, such as "must be a whole number".
    """
    kinds = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    lists = [one for one in kinds if get_origin(one) is list]
    if not isinstance(given, str):
        if not lists:
            raise ValueError("must be one value, not a list")
        return [read_value(get_args(lists[0])[0], word) for word in given]
    if type(None) in kinds and given.lower() in UNSET:
        return None
    one = next((one for one in kinds if one is not type(None) and one not in lists), None)
    if one is None:
        return [read_value(get_args(lists[0])[0], given)]
    if get_origin(one) is Literal:
        return _choice(get_args(one), given)
    return _READERS[one](given)


def read_whole(text: str) -> int:
    """A whole number: 1000, 1_000 and 1e3 are the same."""
    try:
        number = Decimal(text)
    except InvalidOperation:
        number = Decimal("NaN")
    if not number.is_finite() or number != number.to_integral_value() or number.adjusted() > LARGEST_EXPONENT:
        raise ValueError("must be a whole number, such as 1000, 1_000 or 1e3")
    return int(number)


def read_number(text: str) -> float:
    """A number; inf is one, NaN is not."""
    try:
        number = float(re.sub(r"^([+-]?)\.inf$", r"\1inf", text, flags=re.IGNORECASE))  # YAML's way to write it
    except ValueError:
        number = float("nan")
    if number != number:
        raise ValueError("must be a number, such as 0.001 or 1e-3")
    return number


def read_switch(text: str) -> bool:
    """true, yes, on, 1; or false, no, off, 0."""
    if text.lower() in (*ON, *OFF):
        return text.lower() in ON
    raise ValueError("must be true or false")


def expand_path(text: str) -> str:
    """A path with its leading ~ and its variables replaced. Raises ValueError for one that is not set."""
    path = os.path.expandvars(os.path.expanduser(text))
    if unset := re.search(r"\$(\w+|\{\w+\})", path):
        raise ValueError(f"names {unset[0]}, which is not set in the environment")
    if path.startswith("~"):
        raise ValueError(f"names the home folder of a user that this machine does not know ({path.split('/')[0]})")
    return path


def _choice(choices: Sequence[str], text: str) -> str:
    """One of `choices`, in any case of letters; a word for "no" means off or none where that is a choice, and a word
    for "yes" what follows off."""
    for choice in choices:
        if text.lower() == choice.lower():
            return choice
    nothing = next((word for word in ("off", "none") if word in choices), None)
    if nothing and text.lower() in (*OFF, *UNSET):
        return nothing
    if nothing == "off" and text.lower() in ON:
        return choices[choices.index("off") + 1]
    raise ValueError(f"must be one of {', '.join(choices)}{did_you_mean(text, choices)}")


_READERS: dict[Any, Callable[[str], Any]] = {
    int: read_whole, float: read_number, bool: read_switch, str: str, PathText: expand_path,
}  # fmt: skip


def did_you_mean(name: str, names: Collection[str], prefix: str = "") -> str:
    """ "; did you mean ...?" with those of `names` that `name` may stand for, each after `prefix`; "" if there is none.

    SYNONYMS first, then names that share whole words with it, then similar spellings.
    """
    written = _plain(name)
    plain = {known: _plain(known) for known in names}
    found = [known for known in names if plain[known] == written]
    found = found or [known for known in names if written in SYNONYMS.get(known, "").split()]
    if not found and written.startswith("no_"):
        return did_you_mean(written.removeprefix("no_"), names, prefix).replace("?", " false?")
    words = set(written.split("_"))
    found = found or [known for known in names if f"_{written}_" in f"_{plain[known]}_"]
    found = found or [known for known in names if "_" in plain[known] and set(plain[known].split("_")) <= words]
    if not found:
        close = difflib.get_close_matches(written, plain.values(), 3, CLOSE)
        nearest = difflib.get_close_matches(written, close, 1, NEAREST)
        found = [known for known in names if plain[known] in (nearest or close)]
    return _suggestion([prefix + known for known in found[:4]])


def near_path(path: Path) -> str:
    """ "; did you mean ...?" with paths that exist and are spelt like this one, which does not; "" if there is none."""
    while not path.parent.is_dir():  # the first part that is not there
        path = path.parent
    names = {name.lower(): name for name in (os.listdir(path.parent) if os.access(path.parent, os.R_OK) else [])}
    close = difflib.get_close_matches(path.name.lower(), names, 3, CLOSE)
    return _suggestion([str(path.with_name(names[name])) for name in close])


def _suggestion(found: Sequence[str]) -> str:
    *others, last = found or [""]
    return f"; did you mean {', '.join(others)}{' or ' * bool(others)}{last}?" if last else ""


def _plain(name: str) -> str:
    return re.sub(r"[-\s.]", "_", name.lower()).strip("_")


def no_such_folder(path: Path) -> str:
    """What to say of a folder that is not there; in a container, it may only not be bound."""
    if "APPTAINER_CONTAINER" in os.environ or "SINGULARITY_CONTAINER" in os.environ:
        return "there is no such folder in this container: name it in APPTAINER_BIND if the host has it"
    return f"there is no such folder{near_path(path)}"
