"""Stop signals: they set a flag, and the training loop acts on it between two steps.

Saving inside a signal handler would hang in a collective or store half a step. So the signals are blocked, and a thread
waits for them. No call of the main thread is interrupted. Child processes (compilers, trackers, git) inherit the
block, so they survive a signal to the whole process group. A second Ctrl-C interrupts the program at once.
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
    """Catches STOP_SIGNALS from its creation on; `received` is the name of the first."""

    def __init__(self) -> None:
        self.received: str | None = None
        self.began = time.monotonic()
        """Monotonic time when the program began: the flag is the first thing that it creates."""
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
    """Child processes started in this context survive a stop signal until they call `ignore_stop_signals`."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_stop_signals() -> None:
    """Called by a child process: stop signals reach the whole process group, and only the parent acts on them."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
