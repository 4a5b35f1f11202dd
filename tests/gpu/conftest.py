"""For the tests on a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """Whatever synchronises the host with the device raises, until `torch.cuda.set_sync_debug_mode(0)`."""
    yield
    torch.cuda.set_sync_debug_mode(0)
