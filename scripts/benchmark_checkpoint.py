"""Measure saving and loading of checkpoints on this machine, one process; one JSON object a line.

    python scripts/benchmark_checkpoint.py --model_name LLaMmlein_120M [--rows 2 --block_size 256] [--work_dir DIR]

    save    whole_s until the step ended in which it was published; blocked_s of it in which training waited; slowed_s
            by which the steps beside it were slower; both in steps. Twice: the first save allocates, the second reuses
    load    verify_s (hashes, finite weights) and load_s

Peaks of memory are above the state before: of this process on the host, and of the GPU. Needs two checkpoints' room in
--work_dir (12 bytes a parameter each). On a GPU choose --rows and --block_size as in training, so that a step takes as
long as there.
"""

from __future__ import annotations

import json
from pathlib import Path

from lit_gpt.cli import Parser, run_program
from lit_gpt.config import Config


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--model_name", default="LLaMmlein_120M", help="shape of the model")
    parser.add_argument("--rows", type=int, default=2, help="rows of a step")
    parser.add_argument("--block_size", type=int, default=256, help="tokens of a row")
    parser.add_argument("--work_dir", type=Path, help="where to save (default: the system's temporary folder)")
    arguments = parser.parse_args()
    config = Config.from_name(arguments.model_name, block_size=arguments.block_size)
    import torch

    from lit_gpt.checkpoint_benchmark import measure

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    for line in measure(
        config, device, rows=arguments.rows, block_size=arguments.block_size, work_dir=arguments.work_dir
    ):
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    run_program(main)
