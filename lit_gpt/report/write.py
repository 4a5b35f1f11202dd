"""Writes the report of a run: `python -m lit_gpt.report.write RUN_DIR FILE`, which a training starts beside itself."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from lit_gpt.cli import run_program
from lit_gpt.report.run_page import write_report

LOWEST_PRIORITY = 19


def main(argv: Sequence[str] | None = None) -> None:
    run_dir, output = map(Path, sys.argv[1:] if argv is None else argv)
    write_report([run_dir], output)


if __name__ == "__main__":
    os.nice(LOWEST_PRIORITY)
    run_program(main)
