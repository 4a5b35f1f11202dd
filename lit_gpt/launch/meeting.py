"""Where the ranks of a run meet: each comes to rank 0's port, and none goes on before all have come.

A rank that never comes would leave the others in a call that no signal ends. So they wait in Python: they tell every
TELL_S seconds for whom, and leave at a stop signal, when a rank that this program started has ended, or after a limit.
Who leaves says so at the port, and the others leave, too. Met or left is decided once, by the first who says it. A rank
that refuses its input comes to say that (refusal.py).
"""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta

import torch.distributed as dist
from torch import nn
from torch.distributed import PrefixStore, Store, TCPStore
from torch.distributed.device_mesh import DeviceMesh

from lit_gpt.cli import EXIT_BAD_INPUT, EXIT_FAILURE
from lit_gpt.launch.fabric import ClusterEnvironment, ModelParallelStrategy
from lit_gpt.launch.mesh import make_mesh

log = logging.getLogger(__name__)

FIRST_TOLD_S, TELL_S = 2.0, 10.0
NO_RANK_0_S = 5.0
"""After so long the others tell that rank 0 is not there."""
LATE_S = 30.0
"""To load PyTorch may take a rank as long; from then on it is worth a warning."""
_POLL_S = 0.2
_CONNECT_S = 2.0
_GOODBYE_S = 1.0
"""How long who leaves lets the others read why; rank 0's process holds the port."""
REFUSAL_S = 60.0
"""The same where it refuses its input: the others may not have come yet."""
_MET, _STOPPED, _REFUSED = "met", "stopped", "refused: "


class NotMet(Exception):
    """The ranks have not met; the message is one line that says why."""

    exit_code = EXIT_FAILURE


class OneRefused(NotMet):
    """One of them has refused its input."""

    exit_code = EXIT_BAD_INPUT


class StoppedBeforeMeeting(NotMet):
    """A stop signal came to one of them."""


class MeetingStrategy(ModelParallelStrategy):
    """Fabric's strategy, whose process group forms after the ranks have met, and whose mesh is the run's own.

    mesh_shape, timeout: see make_mesh; timeout holds for the group of all ranks, too.
    """

    store: Store
    """Where the ranks have met."""

    def __init__(
        self,
        shard: Callable[[nn.Module, DeviceMesh], nn.Module],
        mesh_shape: Mapping[str, int],
        *,
        backend: str,
        timeout: timedelta,
        limit_s: float,
        stopped: Callable[[], bool],
    ) -> None:
        super().__init__(shard, process_group_backend=backend, timeout=timeout)
        self._mesh_shape, self._group_timeout = mesh_shape, timeout
        self._limit_s, self._stopped = limit_s, stopped

    def setup_environment(self) -> None:
        super(ModelParallelStrategy, self).setup_environment()
        self._setup_distributed()
        self._device_mesh = make_mesh(self.root_device.type, self._mesh_shape, self._group_timeout)

    def _setup_distributed(self) -> None:
        self._set_world_ranks()
        assert self.cluster_environment is not None
        children = getattr(self.launcher, "procs", ())
        self.store = meet(self.cluster_environment, limit_s=self._limit_s, stopped=self._stopped, children=children)
        self.store.set_timeout(self._group_timeout)
        dist.init_process_group(
            self._get_process_group_backend(),
            store=PrefixStore("default_pg", self.store),
            rank=self.global_rank,
            world_size=self.world_size,
            timeout=self._group_timeout,
            device_id=self.root_device if self.root_device.type != "cpu" else None,
        )
        super()._setup_distributed()  # finds the group there


def meet(
    environment: ClusterEnvironment,
    *,
    limit_s: float,
    stopped: Callable[[], bool] = lambda: False,
    children: Sequence[subprocess.Popen[bytes]] = (),
    refused: str | None = None,
) -> Store:
    """Wait for all ranks, at most limit_s seconds; returns the store through which they can now form a group.

    stopped: whether this process shall stop; children: ranks that it has started, from rank 1 on; refused: why this
    rank will not take part, for the others to say. Raises NotMet.
    """
    rank, size = environment.global_rank(), environment.world_size()
    place = f"{environment.main_address}:{environment.main_port}"
    waiting = _Waiting(place, environment, limit_s)
    try:
        store = _reach(environment, waiting, stopped)
        if refused is not None:
            store.compare_set("outcome", "", _REFUSED + refused)
        else:
            store.set(f"rank-{rank}", "")
            if store.add("arrived", 1) == size:
                store.compare_set("outcome", "", _MET)
        while not store.check(["outcome"]):
            reason = _STOPPED if stopped() else _ended(children) or waiting.over()
            if reason:
                store.compare_set("outcome", "", reason)
                continue
            if rank == 0:
                waiting.tell(lambda: [other for other in range(size) if not store.check([f"rank-{other}"])])
            time.sleep(_POLL_S)
        outcome = store.get("outcome").decode()
    except (OSError, RuntimeError) as error:  # RuntimeError: TCPStore's
        raise NotMet(f"rank {rank} of {size} lost rank 0 at {place}, where the ranks meet: {error}") from error
    if outcome == _MET:
        return store
    is_refusal = outcome.startswith(_REFUSED)
    see_off(store, rank, size, REFUSAL_S if is_refusal else _GOODBYE_S, stopped)
    if is_refusal:
        raise OneRefused(outcome.removeprefix(_REFUSED))
    raise StoppedBeforeMeeting if outcome == _STOPPED else NotMet(outcome)


def see_off(store: Store, rank: int, size: int, limit_s: float, stopped: Callable[[], bool] = lambda: False) -> None:
    """Return when all ranks know why they leave, which this one now does, or after limit_s seconds. Rank 0, whose
    process may hold the port, returns last."""
    ends = time.monotonic() + limit_s

    def wait(key: str, count: int) -> None:
        while store.add(key, 0) < count and time.monotonic() < ends and not stopped():
            time.sleep(_POLL_S)

    try:
        store.add("knowing", 1)
        wait("knowing", size)
        if rank:
            store.add("gone", 1)
        else:
            wait("gone", size - 1)
    except RuntimeError:  # the process that holds the port has ended
        pass


def _reach(environment: ClusterEnvironment, waiting: _Waiting, stopped: Callable[[], bool]) -> Store:
    """The store at rank 0's port, which rank 0 opens, unless torchrun has."""
    address, port = environment.main_address, environment.main_port
    opens = environment.global_rank() == 0 and not _of_torchrun()
    while not opens:
        try:
            socket.create_connection((address, port), timeout=_CONNECT_S).close()
            break
        except OSError:
            if stopped():
                raise StoppedBeforeMeeting from None
            if reason := waiting.over():
                raise NotMet(reason) from None
            waiting.tell(lambda: [0])
            time.sleep(_POLL_S)
    return connect(environment, opens=opens)


def connect(environment: ClusterEnvironment, *, opens: bool = False) -> Store:
    """A connection of its own to the store where the ranks meet; opens: of the process that opens it."""
    address, port = environment.main_address, environment.main_port
    store = TCPStore(address, port, is_master=opens, wait_for_workers=False, timeout=timedelta(seconds=30))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "") if _of_torchrun() else ""
    return PrefixStore(f"meeting-{attempt}", store)


def _of_torchrun() -> bool:
    """Whether torchrun has opened the store."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _ended(children: Sequence[subprocess.Popen[bytes]]) -> str | None:
    for rank, child in enumerate(children, start=1):
        if child.poll() == 0:  # a stop signal came to it before it could reach this process
            return _STOPPED
        if child.returncode is not None:
            return f"rank {rank} (process {child.pid}) has ended with exit code {child.returncode} before the ranks met"
    return None


def speaks(rank: int, local_rank: int) -> bool:
    """Whether this rank says what all know: the first of each node, and rank 1, whose wait may be for rank 0."""
    return rank <= 1 or local_rank == 0


def in_words(ranks: Sequence[int], size: int) -> str:
    """Such as "ranks 1, 2 of 4"."""
    more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks[:8]))}{more} of {size}"


class _Waiting:
    """What a rank tells while it waits: rank 0 for all; while it is not there, rank 1 and the first rank of a node."""

    def __init__(self, place: str, environment: ClusterEnvironment, limit_s: float) -> None:
        self._place, self._limit_s = place, limit_s
        self._size = environment.world_size()
        self._tells = speaks(environment.global_rank(), environment.local_rank())
        self._began = time.monotonic()
        self._is_rank_0 = environment.global_rank() == 0
        self._next_s = FIRST_TOLD_S if self._is_rank_0 else NO_RANK_0_S
        self._missing = "other ranks"

    def tell(self, missing: Callable[[], list[int]]) -> None:
        """Log for whom the others wait, when it is time to."""
        waited_s = time.monotonic() - self._began
        if waited_s < self._next_s:
            return
        self._next_s = waited_s + TELL_S
        ranks = missing()
        self._missing = in_words(ranks, self._size)
        if self._tells and ranks:
            limit = f"{waited_s:.0f} s so far, at most {self._limit_s:.0f}"
            level = logging.INFO if self._is_rank_0 and waited_s < LATE_S else logging.WARNING
            log.log(level, "waiting for %s at %s (%s)", self._missing, self._place, limit)

    def over(self) -> str | None:
        """What to say when the limit has passed."""
        if time.monotonic() - self._began < self._limit_s:
            return None
        return f"{self._missing} never came to {self._place} within {self._limit_s:.0f} s (--watchdog_long_s)"
