"""The training program with injected faults: FAULTS lists step:rank:kind.

A fault of the data has a slot in place of step and rank: it hits the rank that reads that row.
FAULTS="5:1:nan_activation slot40:gradient_x100 slot56:kill" python tests/support/faulty_training.py [flags]
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from lit_gpt.cli import BadInput, run_program  # noqa: E402
from lit_gpt.data.loader import Batch  # noqa: E402
from lit_gpt.train.train_step import TrainStep, Update  # noqa: E402
from pretrain.tinyllama_fabric import main  # noqa: E402


def set_one(x: Tensor, value: float) -> Tensor:
    x = x.clone()
    x.view(-1)[7] = value
    return x


Place = tuple[int, int] | int
"""(step, counted from 1; rank), or a slot."""


def faults() -> dict[Place, str]:
    """FAULTS as place -> kind."""
    found: dict[Place, str] = {}
    for entry in os.environ["FAULTS"].split():
        *place, kind = entry.split(":")
        found[(int(place[0]), int(place[1])) if len(place) == 2 else int(place[0].removeprefix("slot"))] = kind
    return found


def break_update(wanted: dict[Place, str]) -> None:
    whole = TrainStep.update

    def update(self: TrainStep, step: int, batches: Sequence[Batch], targets: int) -> Update:
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        slots = [slot for batch in batches for slot in batch.slots.tolist()]
        kind = next((wanted[place] for place in [(step + 1, rank), *slots] if place in wanted), None)
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "bad_input":
            raise BadInput("a shard has gone: put it back")
        if kind == "error":
            raise OSError(5, "Input/output error")

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
            return whole(self, step, batches, targets)
        finally:
            hook.remove()
            if kind == "other_weight":
                with torch.no_grad():
                    row = next(iter(self._optimizer.param_groups[0]["params"])).to_local()[0]
                    row[0] = torch.nextafter(row[0], row[0] + 1)

    TrainStep.update = update  # type: ignore[method-assign]


if __name__ == "__main__":
    break_update(faults())
    run_program(main)
