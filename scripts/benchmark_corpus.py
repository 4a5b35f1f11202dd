"""Speed and memory of build_corpus beside datatrove's own deduplication and a plain program, on text that is made up.

Each row runs in a process of its own; seconds of builds are of the CPU, children included. The row `why` asks a ledger
of ten million rows, or --ledger_rows. Prints one JSON object a line.

Example: python scripts/benchmark_corpus.py --megabytes 500 --folder /tmp/bench
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's lit_gpt, installed or not

from lit_gpt.cli import Parser, require_at_least, run_program

ROWS = ("ours", "datatrove", "plain", "filters", "minhash", "why")


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="folder for the text and what is made of it")
    parser.add_argument("--megabytes", type=int, default=200, help="megabytes of text (%(default)s)")
    parser.add_argument("--ledger_rows", type=int, default=10_000_000, help="rows of the ledger (%(default)s)")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="what to measure")
    parser.add_argument("--measure", choices=ROWS, help="measure this row in this process, and nothing else")
    arguments = parser.parse_args()
    require_at_least(arguments, 1, "megabytes")
    require_at_least(arguments, 1000, "ledger_rows")
    text = arguments.folder / f"text-{arguments.megabytes}"
    if arguments.measure == "why":
        print(json.dumps(asked(arguments.folder, arguments.ledger_rows)))
        return
    if arguments.measure:
        print(json.dumps(measured(arguments.measure, text, arguments.folder / "out", arguments.megabytes)))
        return
    if not text.exists():
        from lit_gpt.bench.bench_corpus import make_text

        make_text(text, arguments.megabytes)
    for row in arguments.rows:
        command = [sys.executable, __file__, "--measure", row, "--folder", arguments.folder]
        command += ["--megabytes", arguments.megabytes, "--ledger_rows", arguments.ledger_rows]
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{row}:\n{done.stderr}")
        print(done.stdout, end="", flush=True)


def measured(row: str, text: Path, out: Path, megabytes: int) -> dict[str, Any]:
    from lit_gpt.bench import bench_corpus as bench

    shutil.rmtree(out, ignore_errors=True)
    runs: dict[str, Callable[[], None]] = {
        "ours": lambda: bench.ours(text, out, ["paragraph_dedup"]),
        "datatrove": lambda: bench.datatroves(text, out),
        "plain": lambda: bench.plain(text, out),
        "filters": lambda: bench.ours(text, out, ["repetition", "quality", "pii"]),
        "minhash": lambda: bench.ours(text, out, ["minhash"]),
    }
    speed = bench.measure(row, megabytes * 1_000_000, runs[row])
    return {
        "what": row, "megabytes": megabytes, "gb_per_core_hour": round(speed.gb_per_core_hour, 1),
        "cpu_s": round(speed.cpu_s, 2), "peak_mb": round(speed.peak_bytes / 1e6),
    }  # fmt: skip


def asked(folder: Path, rows: int) -> dict[str, Any]:
    from lit_gpt.bench import bench_corpus as bench

    ledger = folder / "ledger"
    shutil.rmtree(ledger, ignore_errors=True)
    taken = bench.ask(ledger, bench.make_ledger(ledger, rows))
    found: dict[str, Any] = {"what": "why", "rows": rows}
    for kind, taken_s in zip(("ms", "cpu_ms"), zip(*taken, strict=True), strict=True):
        ranked, first_s = sorted(taken_s), taken_s[0]
        for name, value_s in (
            ("first", first_s), ("median", ranked[len(ranked) // 2]), ("p99", ranked[len(ranked) * 99 // 100]),
            ("most", ranked[-1]),
        ):  # fmt: skip
            found[f"{name}_{kind}"] = round(value_s * 1e3, 1)
    return found


if __name__ == "__main__":
    run_program(main)
