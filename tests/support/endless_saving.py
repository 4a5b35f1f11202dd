"""A program that saves a small checkpoint after another into the folder of its argument, until it is killed."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.checkpoint.test_checkpoint import facts, model_and_optimizer, save

for step in itertools.count(100):
    save(Path(sys.argv[1]), facts(step), *model_and_optimizer(step), full=step % 2 == 0)
