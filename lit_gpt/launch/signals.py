"""Stop requests from outside: a flag that the training loop acts on at a step's edge.

Saving inside a handler would hang in a collective or store half a step. So the signals are blocked, and a thread waits
for them: no call of the main thread is interrupted, and whatever this process starts (compilers, trackers, git)
inherits the block and so ignores a signal that reaches the whole process group. A second Ctrl-C does not wait.
"""

from __future__ import annotations

import _thread
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)


class StopFlag:
    """Takes STOP_SIGNALS from its creation on; `received` is the name of the first that came."""

    def __init__(self) -> None:
        self.received: str | None = None
        self.began = time.monotonic()
        """When the program began: it makes its flag first of all."""
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        threading.Thread(target=self._listen, name="stop-signals", daemon=True).start()

    def _listen(self) -> None:
        interrupted = False
        while True:
            number = signal.sigwait(STOP_SIGNALS)
            if number == signal.SIGINT and interrupted:
                _thread.interrupt_main()
            interrupted |= number == signal.SIGINT
            self.received = self.received or signal.Signals(number).name


@contextmanager
def starting_helpers() -> Iterator[None]:
    """Processes that are started inside do not die of a stop signal before they call `ignore_stop_signals`."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_stop_signals() -> None:
    """For a helper process: the signals reach the whole process group, and only its parent decides."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
