"""Average the checkpoints of a run: a checkpoint of weights that create.sh and evaluate.py read as any other.

Averages the whole checkpoints of the run's history, all alike or, with --half_life_steps, the newest most. A run keeps
them with --keep_last_checkpoints 0 or --keep_every_steps. Where the learning rate has not decayed yet, an average shows
how good the weights are that a decay would give. It needs memory for one model in fp32.

Example: python scripts/average.py --run_dir out/run --window_steps 2000 && python scripts/evaluate.py \\
    --checkpoint out/run/average-00010000 --val_data_dir data/val
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's lit_gpt, installed or not

from lit_gpt.cli import BadInput, Parser, command_line, require_at_least, run_program, say_loading

log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--run_dir", type=Path, required=True, help="run folder")
    add("--to_step", type=int, help="step of the newest checkpoint that is averaged (default: the run's newest)")
    add("--window_steps", type=int, help="average those of the last so many steps before it (default: all)")
    add("--half_life_steps", type=float, help="steps over which the weight halves (default: all count alike)")
    add("--destination_path", type=Path, help="checkpoint to write (default: average-STEP in the run folder)")
    arguments = parser.parse_args(argv)
    require_at_least(arguments, 1, "to_step", "window_steps", "half_life_steps")
    say_loading(arguments.run_dir, "PyTorch")
    from lit_gpt.checkpoint.average import Window, average, chosen

    found = chosen(arguments.run_dir, Window(arguments.to_step, arguments.window_steps))
    destination = arguments.destination_path or arguments.run_dir / f"average-{found[-1].step:08d}"
    try:
        fact = average(arguments.run_dir, found, arguments.half_life_steps, destination)
    except OSError as error:
        raise BadInput(f"cannot write {destination}: {error.strerror}") from None
    for part in fact["checkpoints"]:
        log.info("step %d: weight %.4g", part["step"], part["weight"])
    log.info("published %s", destination)
    log.info("next: %s", command_line("scripts/create.sh", destination))


if __name__ == "__main__":
    run_program(main)
