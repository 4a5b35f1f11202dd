"""Stop requests from outside: a handler that only sets a flag; the training loop acts on it at a step's edge.

Saving inside a handler would hang in a collective or store half a step. A second Ctrl-C does not wait for the edge.
"""

from __future__ import annotations

import logging
import signal
from types import FrameType

log = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)


class StopFlag:
    """Installs handlers for STOP_SIGNALS; `received` is the name of the first that came."""

    def __init__(self) -> None:
        self.received: str | None = None
        for number in STOP_SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        self.received = self.received or signal.Signals(number).name
