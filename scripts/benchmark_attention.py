"""Measure every attention backend that runs here, at the shapes of our models; one JSON object a line.

    python scripts/benchmark_attention.py [--size LLaMmlein_120M LLaMmlein_1B LLaMmlein_7B] [--rows 16]
        [--backend all] [--repetitions 50]

Each is measured on packed documents and on rows of one document each: milliseconds, TFLOP/s, and the relative errors of
the output and of the gradients of q, k and v against fp32 on the same inputs. A backend that cannot run gets
a line that says why. On a CPU the default is the debug shape.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's lit_gpt, installed or not

from lit_gpt.cli import BadInput, Parser, require_at_least, run_program, say_loading
from lit_gpt.config import Config

PUBLISHED = ("LLaMmlein_120M", "LLaMmlein_1B", "LLaMmlein_7B")


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument(
        "--size", nargs="+", action="extend", help="names from the registry of models (default: the published sizes)"
    )
    parser.add_argument("--rows", type=int, default=16, help="rows of a micro-batch")
    parser.add_argument("--backend", default="all", help="run only this backend (default: all)")
    parser.add_argument("--repetitions", type=int, default=50, help="measured calls of each")
    parser.add_argument("--accelerator", default="auto", choices=("auto", "cpu", "cuda"))
    arguments = parser.parse_args()
    require_at_least(arguments, 1, "rows", "repetitions")
    configs = [Config.from_name(size) for size in arguments.size or ()]
    say_loading("attention", "PyTorch")
    import torch

    from lit_gpt.bench.bench_attention import measure

    if arguments.accelerator == "cuda" and not torch.cuda.is_available():
        raise BadInput("--accelerator cuda: no CUDA device is visible. Valid here: cpu")
    on_gpu = torch.cuda.is_available() and arguments.accelerator != "cpu"
    device = torch.device("cuda" if on_gpu else "cpu")
    configs = configs or [Config.from_name(size) for size in (PUBLISHED if on_gpu else ("debug",))]
    for config in configs:
        lines = measure(
            config, device, rows=arguments.rows, requested=arguments.backend, repetitions=arguments.repetitions
        )
        for line in lines:
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    run_program(main)
