"""What rank 0 does for all ranks while they wait: they tell for what, and the watchdog knows who is late.

Costs: a thread on one waiting rank of each node, for as long as the wait.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from lit_gpt.cli import EXIT_BAD_INPUT, BadInput, KnownBadInput
from lit_gpt.launch.fabric import Fabric
from lit_gpt.launch.job import exit_code_after_stall
from lit_gpt.launch.meeting import speaks
from lit_gpt.launch.watchdog import FOR_RANK_ZERO, Watchdog

log = logging.getLogger(__name__)

Result = TypeVar("Result")

FIRST_TOLD_S = 10.0


class Ranks:
    """The ranks of a run, as each of them sees them."""

    def __init__(self, fabric: Fabric, watchdog: Watchdog) -> None:
        self.fabric, self._watchdog = fabric, watchdog

    def on_zero(self, what: str, call: Callable[[], Result], *, share: bool = False) -> Result | None:
        """Make `call` on rank 0 alone; returns its result there and None elsewhere, with share=True the same on all.

        what: what the call does, as in "which is reading the checkpoint"; the others say it after 10, 20, 40 s ...
        A collective: every rank calls it. A BadInput of the call ends every rank with exit code 2; rank 0 raises it.
        """
        result, error = None, None
        is_zero = self.fabric.is_global_zero
        with self._watchdog.within(what if is_zero else FOR_RANK_ZERO), self._told(what):
            if is_zero:
                try:
                    result = call()
                except BadInput as refused:
                    error = refused
            refused_anywhere = self._from_zero(error, what)
        if refused_anywhere is not None:
            if is_zero:
                raise KnownBadInput(str(refused_anywhere))
            sys.exit(EXIT_BAD_INPUT)
        return self.fabric.broadcast(result) if share else result

    def _from_zero(self, error: BadInput | None, what: str) -> BadInput | None:
        began = time.monotonic()
        try:
            return self.fabric.broadcast(error)
        except RuntimeError:
            if time.monotonic() - began < self._watchdog.longest_s:
                raise
            # there is no watchdog, which would have ended all ranks before
            log.error("rank 0, which is %s, did not come within %.0f s", what, self._watchdog.longest_s)
            sys.exit(exit_code_after_stall())

    @contextmanager
    def _told(self, what: str) -> Iterator[None]:
        """While this context lasts, this rank says what it waits for, if it speaks for its node."""
        fabric, limit_s = self.fabric, self._watchdog.longest_s
        if fabric.is_global_zero or not speaks(fabric.global_rank, fabric.local_rank):
            yield
            return
        over, began = threading.Event(), time.monotonic()

        def tell() -> None:
            wait_s = FIRST_TOLD_S
            while not over.wait(wait_s):
                waited_s = time.monotonic() - began
                log.warning("waiting for rank 0, which is %s (%.0f s so far, at most %.0f)", what, waited_s, limit_s)
                wait_s = waited_s  # so that the next line comes at twice the time

        threading.Thread(target=tell, name="tells-the-wait", daemon=True).start()
        try:
            yield
        finally:
            over.set()
