"""Faults of the compiled libraries that read tokenizers, as one line.

`tokenizers` (Rust) raises plain Exception for most malformed files and panics for some; a panic is a BaseException, and
writes a backtrace to file descriptor 2 itself. `sentencepiece` (C++) raises RuntimeError and logs beside it.
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from lit_gpt.cli import BadInput

_DESCRIPTOR_2 = threading.RLock()
"""Held while file descriptor 2 is redirected: two threads at once would restore each other's file."""


@contextmanager
def one_line(what: str) -> Iterator[None]:
    """Turn a fault of the libraries in the block into BadInput(`what`: the fault), without what they wrote beside it.

    Whatever reached stderr in a block without a fault is written after it.
    """
    with _DESCRIPTOR_2, tempfile.TemporaryFile() as said:
        try:
            stderr = os.dup(2)
        except OSError:  # a program without stderr
            stderr = -1
        if stderr >= 0:
            os.dup2(said.fileno(), 2)
        failed = True
        try:
            yield
            failed = False
        except BadInput as error:
            raise BadInput(f"{what}: {error}") from None
        except BaseException as error:
            if type(error).__name__ not in ("Exception", "ValueError", "RuntimeError", "PanicException"):
                raise  # no library's
            raise BadInput(f"{what}: {' '.join(str(error).split())[:300]}") from None
        finally:
            if stderr >= 0:
                os.dup2(stderr, 2)
                os.close(stderr)
                if not failed:
                    said.seek(0)
                    _write_all(said.read())


def _write_all(content: bytes) -> None:
    while content:
        content = content[os.write(2, content) :]
