"""Check a node, or all nodes of a job, before a long run: GPUs, network, disk, clocks, packages.

    python scripts/check_node.py --run_dir out/check                   this machine: its GPUs, or its CPU
    srun --ntasks-per-node=4 python scripts/check_node.py --run_dir /scratch/runs/LLaMmlein_1B

Exit code 0: fit for a run. 1: not fit; the table says what is wrong on which node. What could not be checked is listed,
and does not count.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's lit_gpt, installed or not

from lit_gpt.cli import EXIT_FAILURE, EXIT_OK, Parser, require_at_least, run_program, say_loading
from lit_gpt.launch.site import check_ranks, is_first_process

CHECKPOINT_BYTES_A_WEIGHT = 12
"""fp32: the weight and AdamW's two moments."""


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("--run_dir", type=Path, required=True, help="the run's folder; created if missing")
    parser.add_argument("--model_name", default="LLaMmlein_1B", help="model whose checkpoints have to fit")
    parser.add_argument("--checkpoints", type=int, default=3, help="checkpoints that have to fit at once")
    parser.add_argument("--write_mb", type=int, default=1024, help="size of the test file in MB")
    parser.add_argument("--accelerator", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--devices", type=int, help="processes on this node, if no launcher starts them")
    arguments = parser.parse_args()
    require_at_least(arguments, 1, "checkpoints", "write_mb")
    from lit_gpt.config import Config

    weights = Config.from_name(arguments.model_name).parameters
    needed_bytes = arguments.checkpoints * CHECKPOINT_BYTES_A_WEIGHT * weights

    check_ranks()
    if is_first_process():
        say_loading(f"run folder {arguments.run_dir}", "PyTorch")
    import torch.distributed as dist  # imports torch, for which --help and bad input need not wait
    from rich.console import Console
    from rich.table import Table

    from lit_gpt.datapoints import run_folder
    from lit_gpt.launch.node_check import Measured, judge, measure
    from lit_gpt.launch.settings import LaunchSettings
    from lit_gpt.launch.world import find_world, launch, rank_name

    settings = LaunchSettings(accelerator=arguments.accelerator, devices=arguments.devices)
    world = find_world(settings)
    run_folder.create(arguments.run_dir)
    fabric = launch(settings, world)
    name = rank_name(fabric.global_rank, fabric.device)
    mine = measure(name, fabric.device, fabric.local_rank == 0, arguments.run_dir, arguments.write_mb << 20)
    ranks: list[Measured] = [mine] * world.size
    if dist.is_initialized():
        dist.all_gather_object(ranks, mine)
        dist.destroy_process_group()
    findings = judge(ranks, needed_bytes)
    if fabric.is_global_zero:
        table = Table("", "what", "value", title=f"{world.size} ranks on {world.nodes} nodes")
        for finding in findings:
            table.add_row({True: "ok", False: "BAD", None: ""}[finding.ok], finding.what, finding.value)
        Console(width=None if Console().is_terminal else 160).print(table)
    return EXIT_FAILURE if any(finding.ok is False for finding in findings) else EXIT_OK


if __name__ == "__main__":
    run_program(main)
