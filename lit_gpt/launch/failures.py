"""From the meeting of the ranks to the end of the run: where one rank fails, all end and say which, and why.

A rank that fails tells it at the port where the ranks have met. A thread of each rank looks there, because its main
thread may be anywhere: in a long computation, or in a collective that waits for the rank that failed. A rank that has
only lost the connection to another tells nothing: that other one knows the reason, or rank 0 finds it (lifeline.py).
Costs: a connection to the port, and one small question a second.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Callable
from typing import NoReturn

import torch.distributed as dist
from torch.distributed import Store

from lit_gpt.cli import EXIT_BAD_INPUT, EXIT_FAILURE, BadInput, KnownBadInput, end_at_once, end_failed, print_bad_input
from lit_gpt.launch.cause import FAILED
from lit_gpt.launch.fabric import Fabric
from lit_gpt.launch.job import end_after_parent, report_cause
from lit_gpt.launch.lifeline import Line
from lit_gpt.launch.meeting import MeetingStrategy, connect, see_off, speaks
from lit_gpt.launch.refusal import said_by_others

log = logging.getLogger(__name__)

_LOOK_S = 1.0
_KNOW_S = 10.0
"""How long a rank that leaves waits until all others know why."""
_FAILED = "ended"


class Failures:
    """The failures of the ranks, as one of them tells and hears of them; of one process alone there is nobody to tell.

    Every rank makes it after they have met.
    """

    def __init__(self, fabric: Fabric, line: Line) -> None:
        """line: of this rank, which it leaves before it ends."""
        self._line = line
        self.before_end: Callable[[], None] = lambda: None
        """What this rank still finishes when another has failed; called by a thread, since the main one may wait."""
        self._rank, self._size = fabric.global_rank, fabric.world_size
        self._speaks = speaks(fabric.global_rank, fabric.local_rank)
        self._closed, self._heard = threading.Event(), threading.Event()
        self._store: Store | None = None
        if isinstance(fabric.strategy, MeetingStrategy):
            assert fabric.strategy.cluster_environment is not None
            self._store = connect(fabric.strategy.cluster_environment)
            self._thread = threading.Thread(target=self._look, args=(self._store,), name="failures", daemon=True)
            self._thread.start()

    def end(self, where: str, error: Exception) -> NoReturn:
        """End all ranks after an error of this one: with exit code 2 after a BadInput, else with 1 and a traceback.

        where: the rank and the step. Raises the BadInput where there is no other rank, or all know of it; else this
        process ends here.
        """
        if self._heard.is_set():  # the error follows from that of another rank
            self._thread.join()  # it ends this process
        if _lost_another(error):
            self._line.end_with_lost_rank()
        else:
            code = EXIT_BAD_INPUT if isinstance(error, BadInput) else EXIT_FAILURE
            report_cause(self._line.own_cause(f"{FAILED} ({type(error).__name__}: {error})", code))
        self._line.leave()
        if not isinstance(error, BadInput):
            end_failed(where, error, then=lambda: self._tell(EXIT_FAILURE, f"{type(error).__name__}: {error}", error))
        if self._store is None or isinstance(error, KnownBadInput):
            raise error
        print_bad_input(error)
        end_at_once(EXIT_BAD_INPUT, then=lambda: self._tell(EXIT_BAD_INPUT, str(error), error))

    def close(self) -> None:
        """Hear and tell no more."""
        if self._store is not None:
            self._closed.set()
            self._thread.join(_KNOW_S)

    def _tell(self, exit_code: int, why: str, error: Exception) -> None:
        """Tell the other ranks; returns when they know, or soon; a rank that was started by one waits for its end."""
        self.close()
        if self._store is None or _lost_another(error):
            return
        try:
            self._store.compare_set(_FAILED, "", json.dumps([exit_code, said_by_others(self._rank, why)]))
        except RuntimeError:  # rank 0 has left, with the port
            return
        see_off(self._store, self._rank, self._size, _KNOW_S)
        end_after_parent()

    def _look(self, store: Store) -> None:
        while not self._closed.wait(_LOOK_S):
            if self._line.has_lost_one:  # rank 0 may have left, at which PyTorch would write 15 lines on each rank
                return
            try:
                found = store.get(_FAILED) if store.check([_FAILED]) else None
            except RuntimeError:  # rank 0 has left; the main thread learns it from the group
                return
            if found is not None:
                self._end(store, *json.loads(found))

    def _end(self, store: Store, exit_code: int, why: str) -> NoReturn:
        """End this process; an orderly end would wait for the main thread, and that for the rank that has failed."""
        self._heard.set()
        self._line.leave()
        try:
            if self._speaks:
                log.error("%s", why)
            self.before_end()
            see_off(store, self._rank, self._size, _KNOW_S)
            end_after_parent()
        finally:
            for handler in logging.getLogger().handlers:
                handler.flush()
            os._exit(exit_code)


def _lost_another(error: Exception) -> bool:
    """Whether the error only says that another rank has gone, or does not come."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/transport" in str(error))
