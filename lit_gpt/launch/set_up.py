"""From the meeting of the ranks to the first step: where one rank cannot be set up, all end and say which, and why.

Each sets up its part alone: kernels, model, data. A rank that fails then tells it at the port where the ranks have met.
A thread of each rank looks there, because its main thread may be anywhere: in a long computation, or in a collective
that waits for the rank that failed.
Costs: a connection to the port, and one small question a second, until all are set up.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from torch.distributed import Store

from lit_gpt.cli import EXIT_BAD_INPUT, EXIT_FAILURE, BadInput, KnownBadInput, print_bad_input
from lit_gpt.launch.fabric import Fabric
from lit_gpt.launch.job import end_after_parent
from lit_gpt.launch.meeting import MeetingStrategy, connect, see_off, speaks
from lit_gpt.launch.refusal import refusal
from lit_gpt.launch.world import any_rank

log = logging.getLogger(__name__)

_LOOK_S = 1.0
_KNOW_S = 10.0
"""How long a rank that leaves waits until all others know why."""
_ENDED = "ended"


@contextmanager
def set_up(fabric: Fabric) -> Iterator[None]:
    """A rank that raises in this context ends all: with exit code 2 after a BadInput, else with 1.

    All ranks enter it together, after they have met, and leave it together.
    """
    strategy = fabric.strategy
    if not isinstance(strategy, MeetingStrategy):  # one process
        yield
        return
    assert strategy.cluster_environment is not None
    watch = _Watch(connect(strategy.cluster_environment), fabric)
    try:
        yield
        any_rank(False)  # none leaves while another may still fail
    except KnownBadInput:
        raise
    except BadInput as error:
        print_bad_input(error)
        watch.tell(EXIT_BAD_INPUT, error)
        raise SystemExit(EXIT_BAD_INPUT) from None
    except Exception as error:
        watch.tell(EXIT_FAILURE, error)
        raise
    finally:
        watch.close()


class _Watch:
    """Looks whether another rank has failed, until `close`."""

    def __init__(self, store: Store, fabric: Fabric) -> None:
        self._store, self._rank, self._size = store, fabric.global_rank, fabric.world_size
        self._speaks = speaks(fabric.global_rank, fabric.local_rank)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._look, name="set-up", daemon=True)
        self._thread.start()

    def tell(self, exit_code: int, error: Exception) -> None:
        """Tell the other ranks, and return when they know, or soon."""
        self.close()
        try:
            self._store.compare_set(_ENDED, "", json.dumps([exit_code, refusal(self._rank, error)]))
        except RuntimeError:  # rank 0 has left, with the port
            return
        see_off(self._store, self._rank, self._size, _KNOW_S)

    def close(self) -> None:
        self._closed.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._closed.wait(_LOOK_S):
            try:
                found = self._store.get(_ENDED) if self._store.check([_ENDED]) else None
            except RuntimeError:  # rank 0 has left; the main thread learns it from the group
                return
            if found is not None:
                self._end(*json.loads(found))

    def _end(self, exit_code: int, why: str) -> NoReturn:
        """End this process; an orderly end would wait for the main thread, and that for the rank that has failed."""
        try:
            if self._speaks:
                log.error("%s", why)
            see_off(self._store, self._rank, self._size, _KNOW_S)
            end_after_parent()
        finally:
            for handler in logging.getLogger().handlers:
                handler.flush()
            os._exit(exit_code)
