"""The average of a run's checkpoints: a checkpoint of weights alone, which export and evaluation read as any other.

Averaged are whole checkpoints of the run's history up to a step: all alike, or each half as much for every half-life of
steps that it lies behind the newest. Invariants: the same checkpoints give the same bytes, whichever kind they are
(full, sharded) and however many processes saved them; the weights are fp32, so a run in bf16 loses nothing; run.json is
the newest checkpoint's with `average` added, which names each checkpoint with its step, weight and hash.
Costs: memory for one model in fp32 and one weight; each checkpoint is read twice, for its hashes and its weights.
Sources: Izmailov et al., arXiv:1803.05407 (uniform); Polyak and Juditsky 1992, and the usual EMA (half-lives).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_gpt.checkpoint.checkpoint import model_tensors, names, newest_first, require_model, verified, write_initial
from lit_gpt.checkpoint.history import left_behind
from lit_gpt.checkpoint.record import Checkpoint, DamagedCheckpoint
from lit_gpt.cli import BadInput
from lit_gpt.datapoints.attempts import Mark
from lit_gpt.datapoints.log import FOLDER, begins_with
from lit_gpt.model.gpt import GPT

SAME_RUN = ("tokenizer_fingerprint", "slot_facts")
"""Facts that checkpoints of a run without a datapoint log must share."""


class Window(NamedTuple):
    """Which checkpoints are averaged."""

    to_step: int | None = None
    """Step of the newest one; None: the newest of the run."""
    steps: int | None = None
    """Only those of the last so many steps before it; None: all."""


def average(
    run_dir: Path, found: Sequence[Checkpoint], half_life_steps: float | None, destination: Path
) -> dict[str, Any]:
    """Publish the average of `found`, as `chosen` gives them, as the checkpoint `destination`, which must not exist.

    Returns its fact `average`. Raises BadInput unless all are of one run and of one model.
    """
    _require_one_run(run_dir, found)
    weights = shares([checkpoint.step for checkpoint in found], half_life_steps)
    parts = [
        {"step": checkpoint.step, "weight": weight, "state_xxh3": checkpoint.state_xxh3}
        for checkpoint, weight in zip(found, weights, strict=True)
    ]
    fact = {"half_life_steps": half_life_steps, "checkpoints": parts}
    mean = _mean(found, weights)
    write_initial(destination, found[-1].config, mean.items(), {**found[-1].facts, "average": fact})
    return fact


def chosen(run_dir: Path, window: Window) -> list[Checkpoint]:
    """The checkpoints of the window, oldest first; raises BadInput unless there are two, and all are whole."""
    if not run_dir.is_dir():
        raise BadInput(f"--run_dir {run_dir}: no such folder")
    others = left_behind(run_dir)
    paths = {int(path.name.split("-")[1]): path for path in newest_first(run_dir)[::-1] if path not in others}
    last = max(paths, default=0) if window.to_step is None else window.to_step
    if paths and last not in paths:
        raise BadInput(f"--to_step {last}: {run_dir} has no checkpoint of that step ({names(run_dir)})")
    first = 0 if window.steps is None else last - window.steps + 1
    inside = [path for step, path in paths.items() if first <= step <= last]
    if len(inside) < 2:
        held = ", ".join(path.name for path in inside) or "none"
        raise BadInput(
            f"an average needs two checkpoints or more of the run's history; {run_dir} has {held} from step "
            f"{max(first, 0)} to {last}: widen --window_steps, or train with --keep_last_checkpoints 0 or "
            "--keep_every_steps"
        )
    try:
        return [verified(path) for path in inside]
    except DamagedCheckpoint as error:
        raise BadInput(f"{error}: restore it, or choose a window without it") from None


def shares(steps: Sequence[int], half_life_steps: float | None) -> list[float]:
    """The weight of each checkpoint, of steps in rising order; they sum to 1."""
    lives = [0.0 if half_life_steps is None else (steps[-1] - step) / half_life_steps for step in steps]
    raw = [0.5**life for life in lives]
    return [weight / sum(raw) for weight in raw]


def _require_one_run(run_dir: Path, found: Sequence[Checkpoint]) -> None:
    """Raise BadInput unless all are of the newest one's model, and of one run: of the folder's datapoint log."""
    newest = found[-1]
    for checkpoint in found[:-1]:
        require_model(checkpoint, newest.config)
    marks = [Mark(**mark) for one in found if (mark := one.facts.get("datapoint_log"))]
    if (run_dir / FOLDER).is_dir() and len(marks) == len(found):
        own = [begins_with(run_dir / FOLDER, mark) for mark in marks]
        foreign = [one for one, is_own in zip(found, own, strict=True) if not is_own]
        said = f"{run_dir / FOLDER} is not the record that it was saved with"
    else:
        foreign = [one for one in found if any(one.facts.get(name) != newest.facts.get(name) for name in SAME_RUN)]
        said = f"its data or tokenizer is not that of {newest.path.name}"
    if foreign:
        raise BadInput(f"{foreign[0].path} is of another run: {said}. Move it away, or choose a window without it")


@torch.no_grad()
def _mean(found: Sequence[Checkpoint], weights: Sequence[float]) -> dict[str, Tensor]:
    """The weighted mean in fp32; equal weights give exactly themselves."""
    with torch.device("meta"):
        order = list(GPT(found[-1].config).state_dict())  # the files' own depend on their kind
    mean: dict[str, Tensor] = {}
    total = 0.0
    for checkpoint, weight in zip(found, weights, strict=True):
        total += weight
        try:
            for name, tensor in model_tensors(checkpoint):
                if name in mean:
                    mean[name].lerp_(tensor.float(), weight / total)
                else:
                    mean[name] = tensor.float().contiguous()
        except OSError as error:  # a run that goes on may remove it
            raise BadInput(f"{checkpoint.path} cannot be read: {error.strerror}") from None
    return {name: mean[name] for name in order}
