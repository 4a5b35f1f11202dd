"""Measure a training step of Lightning-AI/litgpt at the shape of one of our models; prints one JSON object.

    python scripts/benchmark_litgpt.py [--size LLaMmlein_1B] [--rows 8] [--precision bf16-mixed] [--steps 20]

The reference of scripts/benchmark_step.py: litgpt's model, loss and optimizer, put together as litgpt's own pretraining
does (lit_gpt/bench/bench_litgpt.py says what is left out). Needs the package litgpt; without it the exit code is 2.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's lit_gpt, installed or not

from lit_gpt.cli import BadInput, Parser, require_at_least, run_program, say_loading
from lit_gpt.config import Config

INSTALL = "pip install -e '.[bench]' && pip install --no-deps litgpt==0.5.13"
"""--no-deps, because litgpt's bounds would install older releases of jsonargparse and huggingface_hub."""


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--size", default="LLaMmlein_1B", help="a name from the registry of models")
    parser.add_argument("--rows", type=int, default=8, help="rows of a step, all in one forward pass")
    parser.add_argument("--precision", default="bf16-mixed", choices=("32-true", "bf16-mixed", "bf16-true"))
    parser.add_argument("--steps", type=int, default=20, help="measured steps")
    parser.add_argument("--warmup", type=int, default=6, help="steps before the measured ones")
    parser.add_argument("--accelerator", default="auto", choices=("auto", "cpu", "cuda"))
    arguments = parser.parse_args()
    require_at_least(arguments, 1, "rows", "steps", "warmup")
    config = Config.from_name(arguments.size)
    if importlib.util.find_spec("litgpt") is None:
        raise BadInput(f"scripts/benchmark_litgpt.py needs litgpt, which is not installed: {INSTALL}")
    say_loading(f"model {arguments.size}", "PyTorch")
    import torch

    if arguments.accelerator == "cuda" and not torch.cuda.is_available():
        raise BadInput("--accelerator cuda: no CUDA device is visible. Valid here: cpu")
    from lit_gpt.bench.bench_litgpt import measure

    line = measure(
        config, precision=arguments.precision, rows=arguments.rows, steps=arguments.steps, warmup=arguments.warmup,
        accelerator=arguments.accelerator,
    )  # fmt: skip
    print(json.dumps(line))


if __name__ == "__main__":
    run_program(main)
