"""build_corpus, which kills itself before it publishes its n-th file: killed_build.py N [argument ...]."""

from __future__ import annotations

import os
import runpy
import signal
import sys
from pathlib import Path

from lit_gpt import files

PROGRAM = Path(__file__).resolve().parents[2] / "scripts/build_corpus.py"

if __name__ == "__main__":
    left, rename = int(sys.argv.pop(1)), files.rename

    def counted(partial: Path, path: Path) -> None:
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(partial, path)

    files.rename = counted
    sys.argv[0] = str(PROGRAM)
    runpy.run_path(str(PROGRAM), run_name="__main__")
