"""The training program in which each rank counts the collectives of the run's control: who calls which, and how often.

They are those that lit_gpt calls, and PyTorch's checkpoints; FSDP's own, which move weights and gradients, are not
counted. Each rank writes its counts to COUNTS.rank. What else it takes is as in faulty_training.py.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[2])]

import torch.distributed as dist  # noqa: E402
from torch.distributed import distributed_c10d  # noqa: E402

from lit_gpt.cli import run_program  # noqa: E402
from pretrain.tinyllama_fabric import main  # noqa: E402
from tests.support.faulty_training import break_moments, break_update, faults  # noqa: E402

COUNTED = (
    "all_reduce", "all_gather", "all_gather_object", "barrier", "gather", "gather_object", "broadcast",
    "broadcast_object_list", "scatter_object_list", "reduce", "all_to_all", "new_group",
)  # fmt: skip
CONTROL = ("lit_gpt.", "torch.distributed.checkpoint.", "lightning")
calls: Counter[str] = Counter()


def counted(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(call)
    def count(*arguments: Any, **more: Any) -> Any:
        caller = sys._getframe(1).f_globals["__name__"]
        if caller.startswith(CONTROL):
            calls[f"{caller} {name}"] += 1
        return call(*arguments, **more)

    return count


def write() -> None:
    rank = os.environ.get("RANK", "0")
    Path(f"{os.environ['COUNTS']}.{rank}").write_text(json.dumps(calls))


if __name__ == "__main__":
    for name in COUNTED:
        whole = getattr(dist, name)
        for module in (dist, distributed_c10d):
            setattr(module, name, counted(name, whole))
    atexit.register(write)
    wanted = faults()
    break_moments(wanted)
    break_update(wanted)
    run_program(main)
