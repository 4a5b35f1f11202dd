"""The report of a run: one HTML file that opens from disk, with all that its folder says. Also of several, together.

    python scripts/report.py out/LLaMmlein_1B                          writes out/LLaMmlein_1B/report.html
    python scripts/report.py out/a out/b --output compared.html
    python scripts/report.py out/LLaMmlein_1B --serve 8000             follows the run, until Ctrl-C

It reads files only, so a run may be training; the training itself writes the same report at each save (--report).
"""

from __future__ import annotations

import argparse
import socket
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
    parser.add_argument(
        "--serve", type=int, metavar="PORT",
        help="instead of a file: serve the page, which follows the run, at an address with a token (0: a free port)",
    )  # fmt: skip
    parser.add_argument("--host", help="with --serve: address to listen at (default: 127.0.0.1, this machine only)")
    arguments = parser.parse_args(argv)
    if arguments.serve is not None:
        serve(arguments)
        return
    if arguments.host is not None:
        raise BadInput(f"--host {arguments.host} goes with --serve")
    output = arguments.output or arguments.run_dirs[0] / "report.html"
    if arguments.output is None and len(arguments.run_dirs) > 1:
        raise BadInput(f"{len(arguments.run_dirs)} runs: say by --output where their report is to lie")

    from lit_gpt.report.run_page import write_report  # its packages take half a second

    try:
        size = write_report(arguments.run_dirs, output)
    except OSError as error:
        raise BadInput(f"{output} cannot be written: {error.strerror}") from None
    print(f"{output}: {size:,} bytes")


def serve(arguments: argparse.Namespace) -> None:
    if arguments.output is not None:
        raise BadInput("--serve and --output: choose one")

    from lit_gpt.report.serve import LOOPBACK, ReportServer

    with ReportServer(arguments.run_dirs, arguments.serve, arguments.host or LOOPBACK) as server:
        host, port = server.server_address[:2]
        try:
            print(server.address)
            if host == LOOPBACK:
                print(
                    f"from another machine: ssh -L {port}:{LOOPBACK}:{port} {socket.gethostname()}, then this address"
                )
            else:
                print("every machine that reaches this one can read it at this address, unencrypted")
            sys.stdout.flush()
            server.serve_forever()
        except KeyboardInterrupt:
            return


if __name__ == "__main__":
    run_program(main)
