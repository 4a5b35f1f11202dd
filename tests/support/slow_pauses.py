"""The training program with slow pauses: SLOW_S seconds before each batch of a validation and each token of a sample,
which it counts on standard error.

SLOW_S=0.5 python tests/support/slow_pauses.py [flags]
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

from torch import Tensor  # noqa: E402

from lit_gpt.cli import run_program  # noqa: E402
from lit_gpt.data.loader import Batch  # noqa: E402
from lit_gpt.train import sampling, validation  # noqa: E402
from pretrain.tinyllama_fabric import main  # noqa: E402

whole, draw = validation.validation_batches, sampling._draw


def say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)
    time.sleep(float(os.environ["SLOW_S"]))


def slow_batches(*args: Any, **kwargs: Any) -> Iterator[Batch]:
    for batch in whole(*args, **kwargs):
        say("validates a batch")
        yield batch


def slow_draw(*args: Any) -> Tensor:
    say("draws a token")
    return draw(*args)


if __name__ == "__main__":
    validation.validation_batches, sampling._draw = slow_batches, slow_draw
    run_program(main)
