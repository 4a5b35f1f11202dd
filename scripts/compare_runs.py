"""Compare the losses of runs that saw the same rows; prints one JSON object a run, the reference's first.

    python scripts/compare_runs.py REFERENCE_RUN RUN [RUN ...] [--plot losses.png]

Over the steps that both logged: the difference from the reference's loss that is largest in absolute value, the mean
absolute difference, and the mean difference (`bias`); also the settings that differ, the last loss, the last validation
loss and tokens/s. If the datapoint logs name different rows, the exit code is 2.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's lit_gpt, installed or not

from lit_gpt.cli import BadInput, Parser, run_program
from lit_gpt.datapoints.compare_runs import PICTURES, compare, draw, open_run


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folders; the first is the reference")
    parser.add_argument("--plot", type=Path, help=f"file for the loss curves ({', '.join(PICTURES)})")
    arguments = parser.parse_args(argv)
    if arguments.plot and arguments.plot.suffix not in PICTURES:
        raise BadInput(f"--plot {arguments.plot}: unknown ending. Valid: {', '.join(PICTURES)}")
    runs = [open_run(folder) for folder in arguments.runs]
    for line in compare(runs):
        print(json.dumps(line))
    if arguments.plot:
        draw(runs, arguments.plot)


if __name__ == "__main__":
    run_program(main)
