"""What a running training shows: a progress bar on a terminal, plain lines in a log file."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from types import TracebackType
from typing import Any

log = logging.getLogger(__name__)


class ProgressBar:
    """A context manager that shows the steps done and the newest line of metrics, on the rank with enabled=True."""

    def __init__(self, max_steps: int, step: int, *, enabled: bool) -> None:
        self._enabled = enabled
        self._max_steps = max_steps
        self._bar = None
        if enabled and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[line]}"),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task("train", total=max_steps, completed=step, line="")

    def show(self, row: Mapping[str, Any]) -> None:
        """Show a line of metrics."""
        if not self._enabled:
            return
        line = f"loss {row['loss']:.4f} | {row['tokens_per_s']:,.0f} tokens/s | grad norm {row['grad_norm']:.3f}"
        if row.get("mfu") is not None:
            line += f" | MFU {row['mfu']:.1%}"
        if row.get("val_loss") is not None:
            line += f" | val loss {row['val_loss']:.4f}, {row['val_bits_per_byte']:.4f} bits/byte"
        if self._bar is not None:
            self._bar.update(self._task, line=line)
        else:
            log.info("step %d/%d | %s | lr %.3g", row["step"], self._max_steps, line, row["learning_rate"])

    def advance(self, step: int) -> None:
        """`step` updates are done."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def __enter__(self) -> ProgressBar:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
