"""What the ranks agree on before each step, by one sum of a few integers on the host (tally.py).

All ranks then do the same, so none waits in a collective for one that has stopped.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from lit_gpt.checkpoint.saver import CheckpointSaver
from lit_gpt.data.loader import Step
from lit_gpt.launch.stop import Pause, StopRequest
from lit_gpt.launch.tally import tally


class Agreed(NamedTuple):
    """What the ranks agreed on for one step."""

    targets: int
    """Valid targets of the step, over all ranks."""
    digest: int
    """Digest of the step's rows: the sum over ranks, modulo 2^64."""
    save_broken: bool
    """Some rank's background save failed."""


def agree(data: Step, stop: StopRequest, saver: CheckpointSaver, pauses: Collection[Pause]) -> Agreed:
    """What the ranks know of this step, and whether they stop before it (stop.agreed). A collective.

    pauses: those that follow the step.
    """
    low, high = data.digest & 0xFFFFFFFF, data.digest >> 32  # two halves, so that no sum overflows
    stops = [stop.signal is not None, stop.out_of_time(saver.longest_s, pauses)]
    targets, low, high, signalled, out_of_time, broken = tally([data.targets, low, high, *stops, saver.broken])
    stop.agree(signalled > 0, out_of_time > 0)
    return Agreed(targets, (low + (high << 32)) % 2**64, broken > 0)


def agree_to_end_pause(stop: StopRequest) -> bool:
    """Whether the ranks end a pause to save at once (stop.agreed says why). A collective."""
    signalled, out_of_time = tally([stop.signal is not None, stop.must_save_now()])
    stop.agree(signalled > 0, out_of_time > 0)
    return stop.agreed is not None
