"""Slurm for the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.slurm import running_slurm


@pytest.fixture(scope="module")
def slurm() -> Iterator[Path]:
    """The configuration of a running Slurm, which ends with the module."""
    with running_slurm() as configuration:
        yield configuration
