"""Runs one of the project's programs with a model so small that a run's files can be kept in the repository.

    python tests/support/kept.py pretrain/tinyllama_fabric.py --model_name kept ...

tests/golden/kept_run.tar.xz was made so, by the programs of commit 364fb1e (version 0.1.0, before the rooms), torch
2.13.0 on a CPU, one thread, in a folder of its own:

    text.jsonl   24 documents of scripts/fetch_german_text.py's from_grammar
    tokenizer/   train_tokenizer --vocab_size 320
    data/     prepare_data --val_fraction 0.1 --workers 1 --shard_tokens 1500
    run/      12 steps on one process; whole checkpoints of steps 8 and 12   (RECIPE, but with
              --keep_every_steps 8 --keep_last_checkpoints 1)
    sharded/  the same up to step 4 on two processes; its checkpoint is sharded
    model/    the export of step 12
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

RECIPE = dict(
    model_name="kept", train_data_dir="data/train", val_data_dir="data/val", tokenizer_path="tokenizer",
    global_batch_size=4, micro_batch_size=2, max_steps=12, learning_rate=3e-3, min_lr=3e-4, warmup_steps=3,
    log_interval_steps=1, save_interval_steps=4, eval_interval_steps=6, accelerator="cpu", precision="32-true",
    tensorboard="false", keep_last_checkpoints=0,
)  # fmt: skip


def main() -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from lit_gpt.config import REGISTRY, Config

    REGISTRY["kept"] = Config(
        name="kept", n_layer=2, n_head=2, n_query_groups=1, n_embd=16, intermediate_size=32, block_size=64,
        vocab_size=320, any_vocabulary=True,
    )  # fmt: skip
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
