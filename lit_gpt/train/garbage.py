"""Python's garbage collector, kept out of the training step: a full collection there would stall every rank."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collected_by_hand() -> Iterator[None]:
    """The collector does not run by itself; what is alive now it leaves out when `gc.collect` is called."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()
