"""One of two gloo ranks that goes through cases of tests/support/resumed_settings.py, each a training in this process.

    python -m tests.support.settings_walk ROOT PORTS NAME...

The first is `base`, which the others resume from step 4. Each rank writes what it saw to ROOT/NAME.<rank>.json.
"""

from __future__ import annotations

import functools
import io
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import torch
from torch.distributed.fsdp import FSDPModule

from lit_gpt.cli import BadInput
from lit_gpt.launch import failures
from lit_gpt.launch.lifeline import Line
from lit_gpt.launch.signals import StopFlag
from lit_gpt.launch.watchdog import limit_s
from lit_gpt.model import gpt
from lit_gpt.train import attempt, sampling, trainer, validation
from lit_gpt.train.adamw import AdamW, RoundingAdamW
from lit_gpt.train.settings import Settings
from lit_gpt.train.train_step import TrainStep
from tests.support.resumed_settings import BASE, CASES, FURTHER, filled


class FakeWandb:
    """Keeps how it was started; a run of it keeps the steps that it was sent."""

    def __init__(self) -> None:
        self.started: dict[str, Any] = {}

    def Settings(self, **options: Any) -> dict[str, Any]:
        return options

    def init(self, **options: Any) -> Any:
        self.started = {name: options[name] for name in ("mode", "project", "name", "id", "settings")} | {"logged": []}
        log = self.started["logged"]
        return SimpleNamespace(log=lambda values, step: log.append(step), finish=lambda: None)


class Spies:
    """What goes through the program's functions: name -> the values that differ."""

    def __init__(self) -> None:
        self.found: dict[str, list[Any]] = {}
        self.validation_batches = 0
        self.objects: dict[str, Any] | None = None
        """What the objects of the training held at its end."""

    def clear(self) -> None:
        self.found.clear()
        self.validation_batches, self.objects = 0, None

    def note(self, name: str, value: Any) -> None:
        values = self.found.setdefault(name, [])
        if value not in values:
            values.append(value)

    def install(self) -> None:
        gpt.Block.compile = functools.partialmethod(gpt.Block.compile, backend="aot_eager")  # type: ignore[assignment]
        torch.compile = functools.partial(torch.compile, backend="aot_eager")  # type: ignore[assignment]
        for optimizer in (AdamW, RoundingAdamW):
            self._around(optimizer, "step_clipped", lambda _, norm, most, **skip: self.note("clips_to", most))
        self._around(sampling, "_draw", lambda logits, temperature, _: self.note("temperatures", temperature))
        self._around(Line, "__init__", lambda *_, silent_s, **more: self.note("silent_rank_s", silent_s))
        self._around(trainer.Trainer, "_finish", self._look)
        reduces = FSDPModule.set_requires_gradient_sync
        self._around(FSDPModule, reduces.__name__, lambda _, reduced, **options: self.note("reduces", reduced))
        self._count_passes()
        whole = validation.validation_batches

        def counted(*arguments: Any, **options: Any) -> Any:
            self.validation_batches = 0
            for batch in whole(*arguments, **options):
                self.validation_batches += 1
                yield batch

        validation.validation_batches = counted

    def _around(self, owner: Any, name: str, note: Callable[..., None]) -> None:
        whole = getattr(owner, name)

        def spied(*arguments: Any, **options: Any) -> Any:
            note(*arguments, **options)
            return whole(*arguments, **options)

        setattr(owner, name, spied)

    def _look(self, ended: trainer.Trainer) -> None:
        self.objects = look(ended)

    def _count_passes(self) -> None:
        whole = TrainStep.update

        def update(step: TrainStep, number: int, batches: Any, targets: int) -> Any:
            norm = getattr(step._model, "module", step._model).transformer.h[0].norm_1
            passes: list[Any] = []
            hook = norm.register_forward_hook(lambda module, inputs, out: passes.append(out.dtype))
            done = whole(step, number, batches, targets)
            hook.remove()
            self.note("micro_batches", [len(batches), *batches[0].tokens.shape])
            self.note("forward_passes", len(passes) // len(batches))
            return done

        TrainStep.update = update  # type: ignore[method-assign]


def main(root: Path, ports: list[int], names: list[str]) -> None:
    rank = int(os.environ["RANK"])
    spies, wandb = Spies(), FakeWandb()
    spies.install()
    sys.modules["wandb"] = wandb  # type: ignore[assignment]
    failures.end_at_once = end_in_order
    for name, port in zip(names, ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        spies.clear()
        wandb.started = {}
        log = Log()
        logging.getLogger().handlers = [log]
        outcome = outcome_of(name, root, rank)
        torch.use_deterministic_algorithms(False)
        torch._dynamo.reset()
        if name == "base" and rank == 0:
            shutil.copytree(root / "base" / "run" / "iter-00000004-ckpt.pth", root / "step-4")
        probe = spies.objects and {
            **spies.objects, **spies.found, "validation_batches": spies.validation_batches, "wandb": wandb.started
        }  # fmt: skip
        found = {"outcome": outcome, "log": log.lines, "probe": probe}
        (root / f"{name}.{rank}.json").write_text(json.dumps(found, default=str))


def end_in_order(exit_code: int, then: Callable[[], None]) -> NoReturn:
    """In place of the end of this process, in which the next case is to come."""
    then()
    raise SystemExit(exit_code)


def outcome_of(name: str, root: Path, rank: int) -> int | str:
    """Run the case; returns the program's exit code, or what it said."""
    case = FURTHER.get(name) or CASES[name]
    run = root / name.replace(" ", "_") / "run"
    if rank == 0 and name != "base":
        resumable(root, run)
    asked = BASE | {"out_dir": str(run), "resume": None if name == "base" else "auto"} | case.change | case.start
    if asked["out_dir"] != str(run):
        asked["resume"] = str(run / "iter-00000004-ckpt.pth")
    flag = object.__new__(StopFlag)  # without its thread and the block on signals
    flag.received, flag.began = None, time.monotonic()
    try:
        settings = Settings(**filled(asked, root))
        settings.check()
        with redirect_stderr(io.StringIO()) as screen:
            return attempt.train(settings, flag)
    except BadInput as error:
        return f"refused: {error}"
    except SystemExit as ended:
        own = [line for line in screen.getvalue().splitlines() if " error: " in line]
        return f"refused: {own[0]}" if ended.code == 2 and len(own) == 1 else f"ended: {ended.code}"


def look(self: Any) -> dict[str, Any]:
    """What the objects of a finished training hold."""
    model, guard, stop, settings = self.model.module, self.train_step.guard, self.stop, self.watchdog._settings
    block, rollbacks = model.transformer.h[0], self.state.rollbacks
    weight = self.optimizer.param_groups[0]["params"][0]
    moment = self.optimizer.state[weight]["exp_avg"]
    sharding = block._get_fsdp_state()._fsdp_param_group
    limit = stop._ends_at - stop._flag.began
    ids = self.inputs.prompts.ids if self.inputs.prompts else None
    return {
        "stall_of_long_steps_s": limit_s(settings, "update", 100, 1000.0),
        "stall_of_short_steps_s": limit_s(settings, "update", 100, 0.0),
        "stall_of_saves_s": limit_s(settings, "save", 100, 0.0),
        "time_limit_s": None if limit == float("inf") else round(limit),
        "margin_s": stop.needed_s() - 2 * (stop._save_s + stop._step_s),
        "sampled_tokens": self.pauses._settings.sample_tokens,
        "saves_beside_training": self.saver._overlap,
        "max_skipped": guard._max_in_a_row,
        "rolls_back": rollbacks._settings.spike_policy == "rollback",
        "spike_factor": guard._factor,
        "spike_window": len(guard._recent),
        "rollback_rows": rollbacks._settings.rollback_steps * 8,
        "most_rollbacks": rollbacks._settings.max_rollbacks,
        "weight_decay": [group["weight_decay"] for group in self.optimizer.param_groups],
        "betas": [list(betas) for betas in {group["betas"] for group in self.optimizer.param_groups}],
        "sharding": [list(weight.device_mesh.shape), sharding.post_forward_mesh_info is not None],
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "prompt_ids": ids,
        "last_step_of_the_data": self.state.length.ends["max_epochs"],
        "cache": [str(self.cache._folder.parent), self.cache._limit_bytes] if self.cache else None,
        "dtypes": [str(weight.dtype), str(moment.dtype), str(model.compute_dtype)],
        "compiled": model.compiled,
        "linear": type(block.attn.qkv).__name__,
    }


class Log(logging.Handler):
    """Keeps the lines."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def resumable(root: Path, run: Path) -> None:
    """A copy of the base run as it was after its checkpoint of step 4: killed later, at step 8."""
    shutil.copytree(root / "base" / "run", run, dirs_exist_ok=True, ignore=shutil.ignore_patterns("iter-*", "watchdog"))
    shutil.copytree(root / "step-4", run / "iter-00000004-ckpt.pth", copy_function=os.link)


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3:])
