"""What each rank does by itself, with one outcome for all: if one fails, no other waits for it."""

from __future__ import annotations

import errno
from collections.abc import Callable
from datetime import timedelta
from typing import NamedTuple

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from lit_gpt.cli import NO_ROOM
from lit_gpt.launch.tally import tally

LEAST_TIMEOUT = timedelta(hours=2)
"""How long a rank waits at least for another's part of a save, which may be written beside many steps; a rank that dies
is noticed at once."""


class Failure(NamedTuple):
    """How the lowest rank of those that failed did so."""

    rank: int
    errno: int | None
    text: str


def first_failure(error: Exception | None, group: dist.ProcessGroup | None = None) -> Failure | None:
    """The failure of the lowest rank with an `error`; None if no rank has one. A collective of all ranks.

    group: of all ranks, on the host; None: the default group, or a single process.
    """
    if not dist.is_initialized():
        return None if error is None else Failure(0, number_of(error), str(error))
    rank, size = dist.get_rank(), dist.get_world_size()
    (first,) = tally([size if error is None else rank], "min", group)
    if first == size:
        return None
    told = [None if error is None else Failure(rank, number_of(error), str(error))]
    dist.broadcast_object_list(told, src=first, group=group)
    return told[0]


def each_or_raise(call: Callable[[], None], group: dist.ProcessGroup | None = None) -> None:
    """Make the call on every rank; if it fails anywhere, all raise: OSError where the cause has an errno, else
    RuntimeError; ranks that failed themselves raise what they met. A collective of all ranks, as first_failure."""
    error: Exception | None = None
    try:
        call()
    except Exception as caught:  # noqa: BLE001 - raised below, when the other ranks know
        error = caught
    failure = first_failure(error, group)
    if error is not None:
        raise error
    if failure is not None:
        text = f"on rank {failure.rank}: {failure.text}"
        raise OSError(failure.errno, text) if failure.errno else RuntimeError(text)


def no_room(error: BaseException) -> str | None:
    """The file system's message, if lack of room was the only failure on all ranks; else None."""
    failures = [error]
    if isinstance(error, CheckpointException):
        failures = [failure for failure, _ in error.failures.values()]
    if all(isinstance(failure, OSError) and failure.errno in NO_ROOM for failure in failures):
        return str(failures[0])
    return None


def number_of(error: Exception) -> int | None:
    """Its errno; that of ranks of which no one had room, as torch.distributed.checkpoint tells of them, is ENOSPC."""
    if isinstance(error, CheckpointException):
        return errno.ENOSPC if no_room(error) is not None else None
    return getattr(error, "errno", None)
