"""What the site's variables (cluster/exec/env.example.sh) say of a run's settings, for the training program.

So the program trains without a flag where the site file was sourced, with the recipe that train_fabric.sh takes.
"""

from __future__ import annotations

import os
from pathlib import Path

from lit_gpt.cli import BadInput
from lit_gpt.config import REGISTRY
from lit_gpt.settings_reader import Given

VARIABLES = {
    "train_data_dir": "TRAIN_DATA_DIR", "val_data_dir": "VAL_DATA_DIR", "tokenizer_path": "TOKENIZER_PATH",
    "cache_dir": "CACHE_DIR", "config": "CONFIG",
}  # fmt: skip
"""Setting -> variable; an empty variable is as one that is not set."""
DEFAULT_RECIPE = "LLaMmlein_1B"


RANKS = ("RANK", "SLURM_PROCID", "LOCAL_RANK")
"""Variables in which torchrun, srun and this program itself tell a process its place among all."""


def is_first_process() -> bool:
    """Whether this process will be rank 0, as far as the environment says: known before PyTorch is loaded."""
    return next((os.environ[name] for name in RANKS if name in os.environ), "0") == "0"


FABRICS_RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")
"""Variables that Fabric reads as numbers when it is imported."""


def check_ranks() -> None:
    """Raise BadInput where a rank in the environment is no number, for which Fabric would end in a traceback."""
    for name in FABRICS_RANKS:
        try:
            int(os.environ.get(name, "0"))
        except ValueError:
            raise BadInput(f"{name}={os.environ[name]} in the environment is not a number: unset it") from None


def is_one_of_several() -> bool:
    """Whether a launcher, or rank 0, has started other ranks too, as far as the environment says."""
    in_step = "SLURM_STEP_ID" in os.environ
    return any(os.environ.get(name, "1") != "1" for name in ("WORLD_SIZE", *(["SLURM_NTASKS"] if in_step else [])))


def site_settings(recipes: Path) -> dict[str, Given]:
    """Setting -> what the environment says of it; recipes: the folder pretrain/configs.

    Where TRAIN_DATA_DIR is set, but not CONFIG, the recipe is that of $MODEL_NAME if there is one, else the 1B model's.
    """
    found = {name: Given(value, f"${key}") for name, key in VARIABLES.items() if (value := os.environ.get(key))}
    model = os.environ.get("MODEL_NAME", "")
    if model in REGISTRY:
        found["model_name"] = Given(model, "$MODEL_NAME")
    if "train_data_dir" in found and "config" not in found:
        named = recipes / f"{model}.yaml"
        recipe = named if model and named.is_file() else recipes / f"{DEFAULT_RECIPE}.yaml"
        found["config"] = Given(str(recipe), "the recipe")
    return found
