"""Measure saving and loading of checkpoints on this machine, one process; one JSON object a line.

    python scripts/benchmark_checkpoint.py --model_name LLaMmlein_120M [--rows 2 --block_size 256] [--work_dir DIR]

    step    step_s: a training step while no save runs
    save    whole_s: until the end of the step in which the checkpoint was published; blocked_s: training waited;
            slowed_s: the steps meanwhile took longer by that, all together; stall_in_steps: blocked_s and slowed_s, in
            steps. Overlapping saves are measured twice: the first allocates host memory, the second reuses it
    load    verify_s (hashes, finite weights) and load_s

Peaks of memory: of the host, what this process used above the state before; of the GPU, the total. Needs room for one
checkpoint in --work_dir (12 bytes a parameter). On a GPU choose --rows and --block_size so that a step takes as long as
in training.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's lit_gpt, installed or not

from lit_gpt.cli import Parser, run_program, say_loading
from lit_gpt.train.settings import StepSettings


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--model_name", default="LLaMmlein_120M", help="shape of the model")
    parser.add_argument("--rows", type=int, default=2, help="rows of a step, all in one forward pass")
    parser.add_argument("--block_size", type=int, default=256, help="tokens of a row")
    parser.add_argument("--precision", default="bf16-mixed", choices=("32-true", "bf16-mixed", "bf16-true"))
    parser.add_argument("--accelerator", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--work_dir", type=Path, help="where to save (default: the system's temporary folder)")
    arguments = parser.parse_args()
    settings = StepSettings(
        model_name=arguments.model_name, block_size=arguments.block_size, precision=arguments.precision,
        global_batch_size=arguments.rows, micro_batch_size=arguments.rows, accelerator=arguments.accelerator,
        devices=1,
    )  # fmt: skip
    settings.check()
    say_loading(f"model {arguments.model_name}", "PyTorch")
    from lit_gpt.bench.bench_checkpoint import measure  # imports torch, which --help need not wait for

    for line in measure(settings, work_dir=arguments.work_dir):
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    run_program(main)
