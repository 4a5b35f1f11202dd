"""The runs in some folders, a line each: model, state, step, losses, speed, last sign of life.

    python scripts/runs.py                     those below out/
    python scripts/runs.py out /scratch/me     those below several folders
    python scripts/runs.py --watch             again every 5 s, until Ctrl-C

States: running; finished; stopped (at a signal, saved); waiting (to be requeued); gave up; failed; dead (no sign of
life, and no end either); empty (no step yet). scripts/report.py shows a run as a page.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's lit_gpt, installed or not

from lit_gpt.cli import BadInput, Parser, require_at_least, run_program

if TYPE_CHECKING:
    from rich.table import Table

    from lit_gpt.report.run_table import RunLine

COLOURS = {
    "running": "green", "finished": "green", "waiting": "yellow", "gave up": "red", "failed": "red", "dead": "red",
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument(
        "folders", nargs="*", type=Path, metavar="FOLDER", help="run folders, or folders with some (default: out)"
    )
    parser.add_argument("--watch", action="store_true", help="show them again and again, until Ctrl-C")
    parser.add_argument("--interval_s", type=float, default=5.0, help="seconds between two looks (default: 5)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    arguments = parser.parse_args(argv)
    require_at_least(arguments, 0.1, "interval_s")
    if arguments.watch and arguments.json:
        raise BadInput("--watch and --json: choose one")
    folders = arguments.folders or [Path("out")]
    if not arguments.watch:
        print(shown(look(folders), as_json=arguments.json))
        return
    try:
        watch(folders, arguments.interval_s)
    except KeyboardInterrupt:
        return


def look(folders: Sequence[Path]) -> list[RunLine]:
    from lit_gpt.report.run_table import find_runs, run_line  # its packages take a moment

    return [run_line(folder) for folder in find_runs(folders)]


def shown(lines: Sequence[RunLine], *, as_json: bool = False) -> str:
    from lit_gpt.report.run_table import text_table

    if as_json:
        return "\n".join(json.dumps(line.fields(), ensure_ascii=False) for line in lines)
    return text_table(lines) if lines else "no run here"


def watch(folders: Sequence[Path], interval_s: float) -> None:
    """Show the runs until Ctrl-C: in place on a terminal, else one table after the other."""
    from rich.console import Console
    from rich.live import Live

    console = Console()
    if not console.is_terminal:
        while True:
            print(shown(look(folders)), flush=True)
            time.sleep(interval_s)
    with Live(coloured(look(folders)), console=console, auto_refresh=False) as live:
        while True:
            time.sleep(interval_s)
            live.update(coloured(look(folders)), refresh=True)


def coloured(lines: Sequence[RunLine]) -> Table:
    from rich.table import Table
    from rich.text import Text

    from lit_gpt.report.run_table import COLUMNS

    table, now = Table(*COLUMNS, box=None, header_style="bold", caption=time.strftime("%H:%M:%S")), time.time()
    for line in lines:
        table.add_row(
            *(Text(cell, style=COLOURS.get(cell, "") if at == 2 else "") for at, cell in enumerate(line.cells(now)))
        )
    return table


if __name__ == "__main__":
    run_program(main)
