"""What a running training shows: lines that stay at the bottom of a terminal, or one log line for each line of metrics.

Both say the same, whatever the width: step, time left and elapsed, epoch, tokens, learning rate, losses, speed. Times
are of this start of the program. The first step, which compiles, does not count for the time left.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

from lit_gpt.report.numbers import duration, short

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

log = logging.getLogger(__name__)


class Clock:
    """Time elapsed since the training began, and time left until max_steps."""

    def __init__(self, max_steps: int, now: Callable[[], float] = time.monotonic) -> None:
        self._max_steps, self._now, self._began = max_steps, now, now()
        self._first: tuple[int, float] | None = None
        self._step = 0

    def advance(self, step: int) -> None:
        """`step` updates are done."""
        self._step = step
        if self._first is None or step < self._first[0]:  # a rollback went back
            self._first = step, self._now()

    def __str__(self) -> str:
        return f"{self._left()} left, {duration(self._now() - self._began)} elapsed"

    def _left(self) -> str:
        if self._first is None or self._step == self._first[0]:
            return duration(0) if self._step >= self._max_steps else "?"
        step, since = self._first
        return duration((self._now() - since) / (self._step - step) * (self._max_steps - self._step))


class ProgressBar:
    """A context manager that shows the steps done and the newest line of metrics, on the rank with enabled=True."""

    def __init__(self, max_steps: int, step: int, *, enabled: bool) -> None:
        self._enabled = enabled
        self._max_steps = max_steps
        self._clock = Clock(max_steps)
        self._numbers: dict[str, str] = {}
        self._bar = None
        if enabled and sys.stderr.isatty():
            from rich.console import Console

            self._bar = terminal_bar(self._clock, self._numbers, Console(stderr=True))
            self._task = self._bar.add_task("train", total=max_steps, completed=step)

    def show(self, row: Mapping[str, Any], epochs: float) -> None:
        """Show a line of metrics; epochs: passes over the training data so far."""
        if not self._enabled:
            return
        numbers = described(row, epochs)
        if self._bar is not None:
            self._numbers.update(numbers)  # a terminal goes on showing the newest validation
        else:
            self._clock.advance(row["step"])
            log.info("step %d/%d | %s | %s", row["step"], self._max_steps, self._clock, " | ".join(numbers.values()))

    def advance(self, step: int) -> None:
        """`step` updates are done."""
        self._clock.advance(step)
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


def described(row: Mapping[str, Any], epochs: float) -> dict[str, str]:
    """The numbers of a line of metrics, each as it is shown; without those that the line does not have."""
    numbers = {
        "epoch": f"epoch {epochs:.2f}",
        "tokens": f"{short(row['tokens'])} tokens",
        "lr": f"lr {row['learning_rate']:.2e}",
        "loss": f"loss {row['loss']:.4f}",
        "grad_norm": f"grad norm {row['grad_norm']:.3f}",
        "speed": f"{row['tokens_per_s']:,.0f} tokens/s",
    }
    if row.get("mfu") is not None:
        numbers["mfu"] = f"MFU {row['mfu']:.1%}"
    if row.get("skipped_steps"):
        numbers["skipped"] = f"{row['skipped_steps']} updates skipped"
    if row.get("val_loss") is not None:
        numbers["val"] = f"val loss {row['val_loss']:.4f}, {row['val_bits_per_byte']:.4f} bits/byte"
    return numbers


def packed(words: Iterable[str], width: int, between: str = " | ") -> list[str]:
    """As few lines as hold all words, none split, each line at most `width` long if its words are."""
    lines: list[str] = []
    for word in words:
        if lines and len(lines[-1]) + len(between) + len(word) <= width:
            lines[-1] += between + word
        else:
            lines.append(word)
    return lines


def terminal_bar(clock: Clock, numbers: Mapping[str, str], console: Console) -> Progress:
    """A bar over the whole width, and below it `numbers` in as many lines as they need."""
    from rich.console import RenderableType
    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
    from rich.table import Column
    from rich.text import Text

    class Times(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(str(clock), no_wrap=True)

    class Bar(Progress):
        def get_renderables(self) -> Iterable[RenderableType]:
            yield self.make_tasks_table(self.tasks)
            yield Text("\n".join(packed(numbers.values(), console.width)), no_wrap=True)

    steps = TextColumn("step {task.completed:.0f}/{task.total:.0f}", markup=False, table_column=Column(no_wrap=True))
    bar = BarColumn(bar_width=None, table_column=Column(ratio=1))  # what the words leave
    columns = (steps, bar, Times(table_column=Column(no_wrap=True)))
    return Bar(*columns, console=console, expand=True, redirect_stdout=False, refresh_per_second=2)
