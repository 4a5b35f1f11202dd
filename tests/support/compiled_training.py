"""The training program with compiled blocks whose attention reads cu_seqlens, as GPU kernels do; on CPUs, quickly.

Each rank writes the number of graphs that it has compiled after each step to GRAPHS.rank, one a line. The compiler's
backend is the plain one, FlashAttention 3 a stand-in, and a batch's cu_seqlens has a multiple of 4 entries, so
that their number changes often.
"""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[2])]

import torch  # noqa: E402
from torch._dynamo.utils import counters  # noqa: E402

from lit_gpt.cli import run_program  # noqa: E402
from lit_gpt.data import loader  # noqa: E402
from lit_gpt.model import gpt  # noqa: E402
from lit_gpt.train import resolve, train_step  # noqa: E402
from pretrain.tinyllama_fabric import main  # noqa: E402
from tests.model.test_attention import fake_fa3  # noqa: E402


def note_graphs() -> None:
    whole = train_step.TrainStep.update

    def update(self: train_step.TrainStep, *arguments: Any) -> train_step.Update:
        done = whole(self, *arguments)
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        with open(f"{os.environ['GRAPHS']}.{rank}", "a") as file:
            file.write(f"{counters['stats']['unique_graphs']}\n")
        return done

    train_step.TrainStep.update = update  # type: ignore[method-assign]


if __name__ == "__main__":
    sys.modules["flash_attn_interface"] = fake_fa3()
    resolve.choose_backend = lambda *_: "fa3"
    gpt.Block.compile = functools.partialmethod(gpt.Block.compile, backend="aot_eager")  # type: ignore[assignment]
    torch.compile = functools.partial(torch.compile, backend="aot_eager")  # type: ignore[assignment]
    loader.CU_SEQLENS_MULTIPLE = 4
    note_graphs()
    run_program(main)
