"""The training program with a slow validation: SLOW_S seconds before each batch, which it counts on standard error.

SLOW_S=0.5 python tests/support/slow_validation.py [flags]
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

from lit_gpt.cli import run_program  # noqa: E402
from lit_gpt.data.loader import Batch  # noqa: E402
from lit_gpt.train import validation  # noqa: E402
from pretrain.tinyllama_fabric import main  # noqa: E402

whole = validation.validation_batches


def slow_batches(*args: Any, **kwargs: Any) -> Iterator[Batch]:
    for batch in whole(*args, **kwargs):
        print("validates a batch", file=sys.stderr, flush=True)
        time.sleep(float(os.environ["SLOW_S"]))
        yield batch


if __name__ == "__main__":
    validation.validation_batches = slow_batches
    run_program(main)
