"""Pretrain a LLaMA model from scratch.

    python pretrain/tinyllama_fabric.py --config pretrain/configs/LLaMmlein_120M.yaml --train_data_dir DIR/train
    srun apptainer exec llammlein.sif python pretrain/tinyllama_fabric.py --config ... --resume auto

Settings: defaults < environment < YAML files (--config) < flags. From the environment come TRAIN_DATA_DIR,
VAL_DATA_DIR, TOKENIZER_PATH, CACHE_DIR and CONFIG (a YAML file), which cluster/exec/env.example.sh explains.

Run folder: --out_dir, else $MODEL_NAME, else out/<model_name>.

With --plan the program only prints what the run will need, and exits.

Exit codes: 0 finished, or stopped early with a checkpoint (at a signal or before the job's end); 75 the same inside a
Slurm job, to be requeued; 74 ended, but the last checkpoint could not be saved; 3 gave up with a checkpoint, after too
many skipped updates in a row or too many rollbacks; 130 a second Ctrl-C, nothing saved; 2 bad input, explained in one
line; anything else is a failure with a traceback.
"""

import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's lit_gpt, installed or not

from lit_gpt.cli import run_program, say_loading
from lit_gpt.launch.job import end_after_parent
from lit_gpt.launch.refusal import refusals_told
from lit_gpt.launch.signals import StopFlag
from lit_gpt.launch.site import check_ranks, is_first_process, site_settings
from lit_gpt.settings_reader import given_flags, parse_settings
from lit_gpt.train.settings import COMMON, Settings, without_recipe_limits

CONFIGS = Path(__file__).resolve().parent / "configs"


def main() -> int:
    stop_flag = StopFlag()  # first of all: a signal during the import of torch must not kill the program
    try:
        return pretrain(stop_flag)
    finally:
        end_after_parent()


def pretrain(stop_flag: StopFlag) -> int:
    """Train as asked for; returns the exit code."""
    if not is_first_process():
        logging.getLogger().setLevel(logging.WARNING)  # what is said once is said by rank 0; `launch` decides again
    check_ranks()  # not told to other ranks: what tells them imports Fabric
    with refusals_told(stop_flag):
        recipes = [path for path in sorted(CONFIGS.glob("*.yaml")) if not path.stem.startswith("corpus_")]
        site = site_settings(CONFIGS)
        settings, files = parse_settings(Settings, None, __doc__, common=COMMON, environment=site, recipes=recipes)
        flags = given_flags()
        settings = without_recipe_limits(settings, flags)
        settings.check()
    say_loading(f"model {settings.model_name}", "PyTorch")
    if settings.plan:
        from lit_gpt.train.run_plan import lines, plan

        print("\n".join(lines(plan(settings, flags))))
        return 0
    from lit_gpt.datapoints.run_folder import read_resolved
    from lit_gpt.train.attempt import train  # imports torch, for which --help and bad input need not wait

    repeated = [found for file in files if (found := read_resolved(file.parent)) is not None]
    return train(settings, stop_flag, repeated[-1] if repeated else None, flags)


if __name__ == "__main__":
    run_program(main)
