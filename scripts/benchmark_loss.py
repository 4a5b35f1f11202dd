"""Measure output projection and loss, forward and backward, beside other implementations; one JSON object a line.

    python scripts/benchmark_loss.py [--tokens 32768] [--width 2048] [--vocabulary 32064] [--dtype bfloat16]

Ours (lit_gpt/model/loss.py, compiled, at several chunk sizes) beside unchunked logits under torch.compile and the fused
losses of liger-kernel and cut-cross-entropy; for one that is not installed, a line says so. Needs a GPU. `error`: the
relative error of the loss and of the gradients of input and weight against fp32 on the same inputs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's lit_gpt, installed or not

from lit_gpt.cli import BadInput, Parser, run_program, say_loading


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=32064)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="of the weight")
    parser.add_argument("--repetitions", type=int, default=15)
    arguments = parser.parse_args()
    say_loading("loss", "PyTorch")
    import torch

    from lit_gpt.bench.bench_loss import measure

    if not torch.cuda.is_available():
        raise BadInput("scripts/benchmark_loss.py needs a CUDA device, and none is visible")
    for line in measure(**vars(arguments)):
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    run_program(main)
