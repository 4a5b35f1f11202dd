"""Keeps Python's garbage collector out of the training step: one rank's full collection would stall all ranks."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def manual_collection() -> Iterator[None]:
    """Turn automatic collection off; `gc.collect` collects only objects made from now on."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()
