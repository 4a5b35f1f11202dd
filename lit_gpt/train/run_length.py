"""How long a run is: one rule for the training, its schedule and --plan.

The smallest of the limits that were given (max_steps, max_tokens, max_epochs) is the run's last step, and there its
schedule ends. max_epochs counts even where nobody gave it: data that ends, ends the run. A limit on the command line
replaces the recipe's (a YAML file's), except that a recipe's max_epochs still says how often its data may be read.
A number of steps or tokens on the command line that the data does not hold is refused, unless --max_epochs stands
beside it: then a person has weighed both.

Invariant: the length is a function of the settings and of how far the run is, so a resume that changes nothing computes
the same. Rows that rollbacks leave out are missing at the end of the data: run and schedule then end earlier.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple, Protocol

from lit_gpt.cli import BadInput
from lit_gpt.data.loader import require_a_step, steps_left
from lit_gpt.train.settings import LIMITS, Settings


class Rows(Protocol):
    """Training data, as far as its length goes (RowReader)."""

    block_size: int
    rows_per_epoch: int

    def rows_within(self, epochs: int) -> int: ...


class Progress(NamedTuple):
    """How far a run is."""

    step: int = 0
    """Updates done."""
    rows: int = 0
    """Rows trained on."""
    slot: int = 0
    """Rows of the present data that are consumed or left out."""
    left_out: Sequence[tuple[int, int]] = ()
    """Ranges of slots that rollbacks left out."""


class RunLength(NamedTuple):
    """Where a run and its schedule end."""

    steps: int
    """The last step."""
    limit: str
    """The setting that ends it."""
    tokens: int
    """Tokens that the model reads from the first step to the last, padding included."""
    epochs: float | None
    """Passes over the data at the last step; of a mixture, over the source that ends first. None without data."""
    ends: dict[str, int]
    """The last step by each limit that was given."""

    def __str__(self) -> str:
        others = ", ".join(f"{name} would allow {end:,}" for name, end in self.ends.items() if end > self.steps)
        epochs = "" if self.epochs is None else f", {self.epochs:.2f} epochs"
        return (
            f"{self.steps:,} steps, {self.tokens:,} tokens{epochs}; run and schedule end by "
            f"{self.limit} at step {self.steps:,}" + (f" ({others})" if others else "")
        )


def run_length(settings: Settings, flags: Collection[str], data: Rows | None, done: Progress) -> RunLength | None:
    """The length of a run that is as far as `done`; None without data where no limit is given.

    flags: names of the settings that the command line gave. Raises BadInput for a length that the data does not hold,
    that the run has passed, or that the schedule does not fit into.
    """
    batch, block_size = settings.global_batch_size, data.block_size if data else settings.config.block_size
    ends = {}
    if settings.max_steps is not None:
        ends["max_steps"] = settings.max_steps
    if settings.max_tokens is not None:
        ends["max_tokens"] = done.step + (settings.max_tokens // block_size - done.rows) // batch
        if ends["max_tokens"] < 1:
            raise BadInput(
                f"--max_tokens {settings.max_tokens}: less than one step of {batch} rows of {block_size} tokens"
            )
    if data is not None:
        total = data.rows_within(settings.max_epochs)
        require_a_step(total, batch, block_size)
        if done.slot > total:
            raise BadInput(
                f"the run has consumed {done.slot} rows, and {settings.max_epochs} epochs of this data have {total}: "
                "allow more by --max_epochs, or begin other data at its start by --new_data true"
            )
        ends["max_epochs"] = done.step + steps_left(done.slot, batch, total, done.left_out)
        if "max_epochs" not in flags:
            _refuse_beyond(settings, flags, ends, data, done)
    if not ends:
        return None
    limit = min(ends, key=lambda name: ends[name])
    steps = ends[limit]
    if steps < done.step:
        raise BadInput(
            f"--{limit} {getattr(settings, limit)} ends the run at step {steps}, and the checkpoint is of step "
            f"{done.step}: give a later end, or resume from an earlier checkpoint by --resume PATH"
        )
    settings.require_schedule_fits(steps, limit)
    to_come = (steps - done.step) * batch
    epochs = (done.slot + to_come) / data.rows_per_epoch if data else None
    return RunLength(steps, limit, (done.rows + to_come) * block_size, epochs, ends)


def _refuse_beyond(
    settings: Settings, flags: Collection[str], ends: dict[str, int], data: Rows, done: Progress
) -> None:
    """Raise BadInput for steps or tokens on the command line that the data does not hold."""
    batch = settings.global_batch_size
    lost = sum(-(-(end - begin) // batch) + 1 for begin, end in done.left_out)  # to rollbacks, at most
    for name in LIMITS[:2]:
        if name in flags and ends[name] > ends["max_epochs"] + lost:
            needed = done.slot + (ends[name] - done.step) * batch
            raise BadInput(
                f"--{name} {getattr(settings, name)}: the data ends after step {ends['max_epochs']} "
                f"({_epochs(settings.max_epochs)} of {data.rows_per_epoch} rows, {batch} a step). Valid: "
                f"--max_epochs {_epochs_for(needed, data)} reads it that often; or at most {ends['max_epochs']} steps"
            )


def _epochs(number: int) -> str:
    return f"{number} epoch{'s' if number > 1 else ''}"


def _epochs_for(rows: int, data: Rows) -> int:
    """The fewest epochs that have so many rows."""
    low, high = 0, 1
    while data.rows_within(high) < rows:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if data.rows_within(middle) >= rows else (middle, high)
    return high
