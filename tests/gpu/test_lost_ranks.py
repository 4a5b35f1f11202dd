"""A rank of two GPUs is killed, stopped, fails or refuses its input: NCCL holds nobody, and one line says why.

`pytest -rP tests/gpu/test_lost_ranks.py` prints for each fault and moment what was told, and when.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.distributed.test_lost_ranks import TOLD, check

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", list(TOLD))
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("moment", ["start", "2", "save", "validate"])
def test_every_fault_at_every_moment(store: Path, tmp_path: Path, moment: str, rank: int, kind: str) -> None:
    check(store, tmp_path / "run", moment, rank, kind, accelerator="cuda", precision="bf16-mixed", compile=False)
