"""The training program in which one rank computes more than the others: SLOW=rank:share of a block's matrix products.

The rank really does them again, inside each block's forward pass. On CPUs the clock counts the multiply-adds of all
matrix products instead of seconds, so that what it shows does not depend on the machine. WINDOW: steps of a window.
SLOW=2:0.1 WINDOW=6 python tests/support/slow_rank.py [flags]
"""

from __future__ import annotations

import functools
import math
import os
import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[2])]

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from lit_gpt.cli import run_program  # noqa: E402
from lit_gpt.model.gpt import Linear  # noqa: E402
from lit_gpt.train import rank_watch  # noqa: E402
from pretrain.tinyllama_fabric import main  # noqa: E402

DONE = [0.0]
"""Multiply-adds so far."""


def count(module: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:
    if isinstance(module, Linear):
        DONE[0] += inputs[0].numel() * out.shape[-1]


@torch.compiler.disable
def compute_more(share: float, block: nn.Module, inputs: tuple[Any, ...]) -> None:
    tokens = math.ceil(share * inputs[0].shape[0] * inputs[0].shape[1])
    with torch.no_grad():
        for linear in (module for module in block.modules() if isinstance(module, Linear)):
            linear(torch.zeros(tokens, linear.in_features, dtype=inputs[0].dtype, device=inputs[0].device))


def slow_down() -> None:
    slow_rank, share = os.environ["SLOW"].split(":")
    whole = rank_watch.RankWatch.__init__

    def begin(self: rank_watch.RankWatch, blocks: Any, *arguments: Any, **more: Any) -> None:
        whole(self, blocks, *arguments, **more)
        if torch.distributed.get_rank() == int(slow_rank):
            for block in blocks:
                block.register_forward_pre_hook(functools.partial(compute_more, float(share)))

    rank_watch.RankWatch.__init__ = begin  # type: ignore[method-assign]


if __name__ == "__main__":
    slow_down()
    rank_watch.WINDOW_STEPS = int(os.environ.get("WINDOW", rank_watch.WINDOW_STEPS))
    if not torch.cuda.is_available():
        nn.modules.module.register_module_forward_hook(count)
        clock = functools.partial(rank_watch.ComputeClock, now=lambda: DONE[0])
        rank_watch.ComputeClock = clock  # type: ignore[misc, assignment]
    run_program(main)
