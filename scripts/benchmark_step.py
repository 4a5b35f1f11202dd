"""Measure a training step on this device; one JSON object a line.

    python scripts/benchmark_step.py --size LLaMmlein_1B --rows 16 [--precision bf16-true] [--attention fa4]
        [--mlp quack] [--float8 tensorwise] [--checkpointing selective] [--compile false] [--deterministic]
        [--optimizer muon] [--micro_batch N] [--devices N] [--sharding_strategy FULL_SHARD]
        [--gradient_sync step] [--breakdown]

The step is that of the training program, on packed random documents with the lengths of German web text. --breakdown
prints where the time goes, beside the least time that the device's measured rates of matmuls and copies allow.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's lit_gpt, installed or not

from lit_gpt.cli import BadInput, Parser, require_at_least, run_program, say_loading
from lit_gpt.launch.site import check_ranks, is_first_process
from lit_gpt.train.settings import StepSettings


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--size", default="LLaMmlein_1B", help="a name from the registry of models")
    parser.add_argument("--rows", type=int, default=16, help="rows of a step on each device")
    parser.add_argument("--micro_batch", type=int, help="rows of a forward pass (default: all rows of the step)")
    parser.add_argument("--precision", default="bf16-mixed", choices=("32-true", "bf16-mixed", "bf16-true"))
    parser.add_argument("--optimizer", default="adamw", choices=("adamw", "muon"))
    parser.add_argument("--float8", default="none", choices=("none", "tensorwise", "rowwise"))
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--mlp", default="auto", choices=("auto", "quack", "torch"))
    parser.add_argument("--checkpointing", default="none", choices=("none", "selective", "full"))
    parser.add_argument("--compile", default=None, choices=("true", "false"), help="default: on GPUs")
    parser.add_argument("--deterministic", action="store_true", help="use only deterministic kernels")
    parser.add_argument("--accelerator", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--devices", type=int, default=1, help="processes, one a GPU")
    parser.add_argument(
        "--sharding_strategy", default="FULL_SHARD", choices=("FULL_SHARD", "SHARD_GRAD_OP", "HYBRID_SHARD", "NO_SHARD")
    )
    parser.add_argument("--gradient_sync", default="step", choices=("step", "micro_batch"))
    parser.add_argument("--steps", type=int, default=20, help="measured steps")
    parser.add_argument("--warmup", type=int, default=6, help="steps before the measured ones")
    parser.add_argument("--breakdown", action="store_true", help="print where the time goes; on GPUs")
    arguments = parser.parse_args()
    micro_batch = arguments.micro_batch or arguments.rows
    if arguments.rows < 1 or micro_batch < 1 or arguments.rows % micro_batch:
        raise BadInput(f"--micro_batch {micro_batch} does not divide --rows {arguments.rows}")
    require_at_least(arguments, 1, "steps", "warmup", "devices")
    settings = StepSettings(
        model_name=arguments.size, global_batch_size=arguments.rows * arguments.devices, micro_batch_size=micro_batch,
        precision=arguments.precision, float8=arguments.float8, attention=arguments.attention,
        mlp=arguments.mlp, optimizer=arguments.optimizer, deterministic=arguments.deterministic,
        activation_checkpointing=arguments.checkpointing, accelerator=arguments.accelerator, devices=arguments.devices,
        sharding_strategy=arguments.sharding_strategy, gradient_sync=arguments.gradient_sync,
        compile=None if arguments.compile is None else arguments.compile == "true",
    )  # fmt: skip
    settings.check()
    check_ranks()
    if is_first_process():
        say_loading(f"model {arguments.size}", "PyTorch")
    from lit_gpt.bench.bench_step import measure  # imports torch, which --help need not wait for

    for line in measure(settings, steps=arguments.steps, warmup=arguments.warmup, breakdown=arguments.breakdown):
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    run_program(main)
