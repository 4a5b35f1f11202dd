"""Stop signals: they set a flag, and the training loop acts on it between two steps.

Saving inside a signal handler would hang in a collective or store half a step. So the signals are blocked, and a thread
waits for them. No call of the main thread is interrupted. Child processes (compilers, trackers, git) inherit the
block, so they survive a signal to the whole process group. The thread answers each signal with a line in the log. A
second Ctrl-C ends the program at once, whatever its main thread does: without saving, with EXIT_ABORTED.

SIGHUP says that the terminal is gone: the run saves, and writes no more to it. A program that nohup started goes on.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

from lit_gpt.cli import EXIT_ABORTED

log = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP)

SHOW_CURSOR = "\x1b[?25h"


def answer_before_training(name: str) -> str:
    """What a signal is answered with until the training loop gives a better answer."""
    again = "; again: abort at once" if name == "SIGINT" else ""
    return f"{name}: stopping before the first step, nothing new to save{again}"


class StopFlag:
    """Catches STOP_SIGNALS from its creation on; `received` is the name of the first."""

    def __init__(self) -> None:
        self.received: str | None = None
        self.began = time.monotonic()
        """Monotonic time when the program began: the flag is the first thing that it creates."""
        self.answer: Callable[[str], str] = answer_before_training
        """The line that answers the signal of this name; logged at level INFO, so that one rank of a run says it."""
        self.children: Callable[[], Sequence[subprocess.Popen[bytes]]] = lambda: ()
        """The ranks that this process has started, which it takes along when it aborts."""
        hangup_ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN  # by nohup
        self._signals = [number for number in STOP_SIGNALS if number != signal.SIGHUP or not hangup_ignored]
        self._terminals = [number for number in (1, 2) if os.isatty(number)]
        signal.pthread_sigmask(signal.SIG_BLOCK, self._signals)
        threading.Thread(target=self._listen, name="stop-signals", daemon=True).start()

    def _listen(self) -> None:
        interrupted = False
        while True:
            number = signal.Signals(signal.sigwait(self._signals))
            if number == signal.SIGHUP:
                self._leave_lost_terminals()
            if number == signal.SIGINT and interrupted:
                self._abort()
            interrupted |= number == signal.SIGINT
            self.received = self.received or number.name
            log.info("%s", self.answer(number.name))

    def _leave_lost_terminals(self) -> None:
        """Writing to a terminal that is gone is an error, which would end the run before it has saved."""
        for number in self._terminals:
            if not os.isatty(number):
                os.dup2(os.open(os.devnull, os.O_WRONLY), number)

    def _abort(self) -> NoReturn:
        """End this process and the ranks that it has started; the main thread may hang, so not in an orderly way."""
        log.info("SIGINT again: aborted without saving")
        for child in self.children():
            child.kill()
        if sys.stderr.isatty():
            sys.stderr.write(SHOW_CURSOR)  # a progress bar hides it
        sys.stderr.flush()
        os._exit(EXIT_ABORTED)


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
