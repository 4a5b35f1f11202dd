"""Sends a run's metrics to Weights & Biases, on request; the training never depends on it.

Any failure (no package, no server, no DNS, a wrong key) is one warning, and the run goes on: offline if the package is
installed, so that nothing is lost, and without Weights & Biases otherwise. The run's id lies in the run folder, so a
resumed run continues the same curves; sent_steps.py says which step goes to which run. The package reads the API key
itself. It keeps its lines in the run folder: on a full disk it loses one, then all that follow, and does not say so; so
the run is left before that (`has_room`, `leave`).

Costs: lines go to the package's own process; only start and end wait for the server, at most `timeout_s` each.
"""

from __future__ import annotations

import logging
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from lit_gpt.train.sent_steps import SentSteps

log = logging.getLogger(__name__)

Mode = Literal["online", "offline"]

_BLOCK_BYTES = 32 << 10
"""What the package writes at once."""


def has_room(run_dir: Path) -> bool:
    """Whether the package can still write there."""
    return shutil.disk_usage(run_dir).free >= 2 * _BLOCK_BYTES


class WandbRun:
    """Weights & Biases for one attempt of a run; `step` is the number of updates that are done."""

    def __init__(
        self, run_dir: Path, mode: Mode, *, project: str, name: str | None, config: Mapping[str, Any], sent: SentSteps,
        timeout_s: int,
    ) -> None:  # fmt: skip
        self._sent = sent
        self._timeout_s, self._run_dir = timeout_s, run_dir
        options = dict(project=project, name=name or run_dir.resolve().name, id=sent.run_id, config=dict(config))
        self._run = self._start(mode, options)

    def _start(self, mode: Mode, options: dict[str, Any]) -> Any:
        try:
            import wandb
        except ImportError:
            log.warning("--wandb %s: the package is not installed (pip install wandb): going on without it", mode)
            return None
        settings = wandb.Settings(
            init_timeout=self._timeout_s, login_timeout=self._timeout_s, silent=True, console="off", disable_git=True
        )
        try:
            run = wandb.init(dir=str(self._run_dir), mode=mode, resume="allow", settings=settings, **options)
            for diary in logging.getLogger("wandb").handlers:
                diary.handleError = _ignore  # type: ignore[method-assign]
            return run
        except Exception as error:  # noqa: BLE001 - whatever it is, it must not end the training
            reason = " ".join(str(error).split())[:300]
            if mode == "offline":
                log.warning("--wandb offline: %s: going on without it", reason)
                return None
            log.warning(
                "--wandb online: %s: going on offline, in %s; `wandb sync` uploads it later", reason, self._run_dir
            )
            wandb.teardown()  # otherwise its process still holds the run's id
            logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)  # it would log errors at exit
            return self._start("offline", options)

    def leave(self) -> None:
        """End the run, of which the next start or the next room on the disk makes a new one."""
        log.error(
            "Weights & Biases: no room for its files in %s: run %s is left. Training goes on; another run gets all "
            "lines of metrics.csv when there is room",
            self._run_dir, self._sent.run_id,
        )  # fmt: skip
        self._sent.forget()
        self.close()

    def log(self, step: int, values: Mapping[str, float | int]) -> None:
        """Send one line of metrics, unless its step was sent."""
        if self._run is None or step <= self._sent.step:
            return
        self._sent.note(step)
        try:
            self._run.log({name: value for name, value in values.items() if name != "step"}, step=step)
        except Exception as error:  # noqa: BLE001 - as above
            log.warning("Weights & Biases failed at step %d: %s: going on without it", step, error)
            self._run = None

    def close(self) -> None:
        """Wait for the last lines to be sent, at most timeout_s: a job has few seconds left."""
        if self._run is None:
            return
        failures: list[Exception] = []
        sender = threading.Thread(target=_finish, args=(self._run, failures), name="wandb-finish", daemon=True)
        sender.start()
        sender.join(self._timeout_s)
        if sender.is_alive() or failures:
            reason = failures[0] if failures else f"not done after {self._timeout_s} s"
            log.warning("Weights & Biases: the last lines were not sent (%s): `wandb sync` does it later", reason)


def _ignore(record: logging.LogRecord) -> None:
    """Where the package's own diary cannot be written, it would print a traceback a line."""


def _finish(run: Any, failures: list[Exception]) -> None:
    try:
        run.finish()
    except Exception as error:  # noqa: BLE001 - logged by close
        failures.append(error)
