"""A file system without locks, like Lustre without `-o flock`: every flock fails."""

from __future__ import annotations

import errno
import fcntl
import os

import pytest

NO_LOCKS = """
import errno, fcntl, os
def flock(descriptor, operation):
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
fcntl.flock = flock
"""
"""Code to run in another process, in which every flock fails then."""


def without_locks(monkeypatch: pytest.MonkeyPatch, number: int = errno.ENOLCK) -> None:
    """Make every flock of this process fail with errno `number`."""

    def flock(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
