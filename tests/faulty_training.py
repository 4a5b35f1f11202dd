"""The training program on a machine that computes wrongly: FAULTS says at which step, on which rank, and what.

FAULTS="5:1:nan_activation 7:0:gradient_x100" python tests/faulty_training.py [flags of the training program]
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from lit_gpt.cli import run_program  # noqa: E402
from lit_gpt.train_step import TrainStep, Update  # noqa: E402
from pretrain.tinyllama_fabric import main  # noqa: E402


def set_one(x: Tensor, value: float) -> Tensor:
    x = x.clone()
    x.view(-1)[7] = value
    return x


def faults() -> dict[tuple[int, int], str]:
    """(step, counted from 1; rank) -> kind."""
    parts = [entry.split(":") for entry in os.environ["FAULTS"].split()]
    return {(int(step), int(rank)): kind for step, rank, kind in parts}


def break_update(wanted: dict[tuple[int, int], str]) -> None:
    whole = TrainStep.update

    def update(self: TrainStep, step: int, *arguments: Any) -> Update:
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        kind = wanted.get((step + 1, rank))

        def after_block(module: torch.nn.Module, inputs: Any, out: Tensor) -> Tensor:
            if kind == "nan_activation":
                return set_one(out, float("nan"))
            if kind == "inf_gradient":
                out.register_hook(lambda gradient: set_one(gradient, float("inf")))
            elif kind == "gradient_x100":
                out.register_hook(lambda gradient: gradient * 100)
            return out

        model = getattr(self._model, "module", self._model)
        hook = model.transformer.h[-1].register_forward_hook(after_block)
        try:
            return whole(self, step, *arguments)
        finally:
            hook.remove()

    TrainStep.update = update  # type: ignore[method-assign]


if __name__ == "__main__":
    break_update(faults())
    run_program(main)
