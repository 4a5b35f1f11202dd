"""One of several gloo ranks, which calls a function of a test module with its rank and a folder.

    python tests/support/rank_function.py MODULE FUNCTION FOLDER

tests/support/programs.py: `call_on_ranks` starts them.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2])]

import torch.distributed as dist  # noqa: E402

if __name__ == "__main__":
    module, function, folder = sys.argv[1:]
    dist.init_process_group("gloo")
    getattr(importlib.import_module(module), function)(dist.get_rank(), Path(folder))
    dist.destroy_process_group()
