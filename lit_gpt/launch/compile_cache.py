"""One folder for all that is compiled, where the site names one ($COMPILE_CACHE_DIR): a start after the first is warm.

Without it, compiled code lies in /tmp of the node and in the home folder, or in memory only (FlashAttention 4's), and a
job on other nodes, or in a container, compiles anew. All ranks and jobs of a user may share the folder: an entry's name
is a hash of source, versions and device, and it appears whole, by a rename. What lies there is run, so nobody else may
write to it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from pathlib import Path

from lit_gpt.cli import BadInput

FOLDER = "COMPILE_CACHE_DIR"
PARTS = {
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TRITON_CACHE_DIR": "triton",
    "CUTE_DSL_CACHE_DIR": "cute",
    "CUDA_CACHE_PATH": "cuda",
}
"""Variable of a compiler -> its subfolder."""
WITH_LOCKS = {"FLASH_ATTENTION_CUTE_DSL_CACHE_DIR": "fa4", "QUACK_CACHE_DIR": "quack"}
"""The same of FlashAttention 4 and quack-kernels: on a file system without locks one fails, the other waits."""
FA4_SWITCH = "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED"


def use_compile_cache() -> None:
    """Point the compilers to the folder; one whose variable is set already keeps it. Call it before they are imported.

    Raises BadInput for a folder that cannot be written, or that others can write.
    """
    if not os.environ.get(FOLDER):
        return
    folder = Path(os.environ[FOLDER]).expanduser().absolute()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
        _require_own(folder, found)
        locks = _has_locks(folder)
    except OSError as error:
        raise BadInput(f"{FOLDER}={folder}: it cannot be written ({error.strerror}). Name another folder") from None
    for name, part in (PARTS | WITH_LOCKS if locks else PARTS).items():
        os.environ.setdefault(name, str(folder / part))
    if locks:
        os.environ.setdefault(FA4_SWITCH, "1")


def _require_own(folder: Path, found: os.stat_result) -> None:
    if found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise BadInput(
            f"{FOLDER}={folder}: others can write to it, and what lies there is run. Name a folder of your own, or "
            "take the right from the others: chmod go-w"
        )


def _has_locks(folder: Path) -> bool:
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno == errno.EWOULDBLOCK:
            raise
        return False
    finally:
        os.close(descriptor)
    return True
