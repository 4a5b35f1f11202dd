"""Says how far a save is while the training loop waits for it: for 7B that is a minute."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

log = logging.getLogger(__name__)

TELL_S = 10.0


class SaveProgress:
    """What a save is doing; the thread that writes says so, and any thread may read it."""

    def __init__(self, size: int) -> None:
        self._size = size
        """Bytes that the state will have, about."""
        self._folder: Path | None = None
        self._name, self._doing, self._began = "", "", 0.0

    def begin(self, folder: Path, name: str) -> None:
        """A save into `folder` begins, which is published as `name`."""
        self._folder, self._name, self._doing, self._began = folder, name, "being written", time.monotonic()

    def written(self) -> None:
        """All bytes of the state are in files."""
        self._doing = "being synced and hashed"

    @contextmanager
    def told(self, *, by_this_rank: bool) -> Iterator[None]:
        """Log a line every TELL_S seconds until the block ends."""
        over = threading.Event()
        if by_this_rank:
            threading.Thread(target=self._tell, args=(over,), name="save-progress", daemon=True).start()
        try:
            yield
        finally:
            over.set()

    def _tell(self, over: threading.Event) -> None:
        while not over.wait(TELL_S):
            log.info("training waits for a save: %s", self)

    def __str__(self) -> str:
        seconds, there = time.monotonic() - self._began, _bytes(self._folder)
        on_disk = f"{there / 1e9:.2f} of about {self._size / 1e9:.2f} GB"
        return f"{self._name} is {self._doing}, {on_disk} after {seconds:.0f} s"


def _bytes(folder: Path | None) -> int:
    if folder is None:
        return 0
    size = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):  # just renamed
                size += os.stat(os.path.join(parent, name)).st_size
    return size
