"""The report of a run: one HTML file that opens from disk, with all that its folder says. Also of several, together.

    python scripts/report.py out/LLaMmlein_1B                          writes out/LLaMmlein_1B/report.html
    python scripts/report.py out/a out/b --output compared.html

It reads files only, so a run may be training; the training itself writes the same report at each save (--report).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's lit_gpt, installed or not

from lit_gpt.cli import BadInput, Parser, run_program


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("run_dirs", nargs="+", type=Path, metavar="RUN_DIR", help="folder of a run")
    parser.add_argument(
        "--output", type=Path, help="file to write (default: report.html in the run's folder; needed for several runs)"
    )
    arguments = parser.parse_args(argv)
    output = arguments.output or arguments.run_dirs[0] / "report.html"
    if arguments.output is None and len(arguments.run_dirs) > 1:
        raise BadInput(f"{len(arguments.run_dirs)} runs: say by --output where their report is to lie")

    from lit_gpt.report.run_page import write_report  # its packages take half a second

    try:
        size = write_report(arguments.run_dirs, output)
    except OSError as error:
        raise BadInput(f"{output} cannot be written: {error.strerror}") from None
    print(f"{output}: {size:,} bytes")


if __name__ == "__main__":
    run_program(main)
