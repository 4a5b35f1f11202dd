"""The training program with injected faults: FAULTS lists step:rank:kind.

A fault of the data has a slot in place of step and rank: it hits the rank that reads that row. In place of the step
there may be a moment: start, save or validate.
FAULTS="5:1:nan_activation slot40:gradient_x100 slot56:kill" python tests/support/faulty_training.py [flags]
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from lit_gpt.checkpoint.saver import CheckpointSaver  # noqa: E402
from lit_gpt.cli import BadInput, run_program  # noqa: E402
from lit_gpt.data.loader import Batch  # noqa: E402
from lit_gpt.train.pauses import Pauses  # noqa: E402
from lit_gpt.train.run_state import RunState  # noqa: E402
from lit_gpt.train.train_step import TrainStep, Update  # noqa: E402
from pretrain.tinyllama_fabric import main  # noqa: E402


def set_one(x: Tensor, value: float) -> Tensor:
    x = x.clone()
    x.view(-1)[7] = value
    return x


Place = tuple[int | str, int] | int
"""(step, counted from 1, or moment; rank), or a slot."""
MOMENTS: dict[str, tuple[type, str]] = {
    "start": (RunState, "start"), "save": (CheckpointSaver, "save"), "validate": (Pauses, "validate"),
}  # fmt: skip


def faults() -> dict[Place, str]:
    """FAULTS as place -> kind."""
    found: dict[Place, str] = {}
    for entry in os.environ["FAULTS"].split():
        *place, kind = entry.split(":")
        if len(place) == 2:
            found[place[0] if place[0] in MOMENTS else int(place[0]), int(place[1])] = kind
        else:
            found[int(place[0].removeprefix("slot"))] = kind
    return found


def hurt(kind: str | None) -> None:
    """A fault of the whole process."""
    if kind in ("kill", "stop"):
        os.kill(os.getpid(), signal.SIGKILL if kind == "kill" else signal.SIGSTOP)
    if kind == "term":
        os.kill(os.getpid(), signal.SIGTERM)
    if kind == "wait":
        time.sleep(3600)
    if kind == "bad_input":
        raise BadInput("a shard has gone: put it back")
    if kind == "error":
        raise OSError(5, "Input/output error")


def this_rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def break_moments(wanted: dict[Place, str]) -> None:
    def broken(moment: str, whole: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **more: Any) -> Any:
            hurt(wanted.get((moment, this_rank())))
            return whole(*arguments, **more)

        return call

    for moment, (owner, name) in MOMENTS.items():
        setattr(owner, name, broken(moment, getattr(owner, name)))


def break_update(wanted: dict[Place, str]) -> None:
    whole = TrainStep.update

    def update(self: TrainStep, step: int, batches: Sequence[Batch], targets: int) -> Update:
        slots = [slot for batch in batches for slot in batch.slots.tolist()]
        kind = next((wanted[place] for place in [(step + 1, this_rank()), *slots] if place in wanted), None)
        hurt(kind)

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
    break_moments(faults())
    run_program(main)
