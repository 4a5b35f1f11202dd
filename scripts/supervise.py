"""Start a run again when it loses a rank.

    python scripts/supervise.py -- python pretrain/tinyllama_fabric.py ... --resume auto
    python scripts/supervise.py --restarts 5 -- torchrun --nproc-per-node=4 pretrain/tinyllama_fabric.py ...

The command should have --resume auto, so that a restart continues from the newest whole checkpoint. Stop signals go to
the command, which is then not started again; nor is it after bad input (2) or any other end that a restart does not
mend. The same step is tried at most 3 times. Exit code: the command's last.

Under Slurm train_fabric.sh does the same. It asks this program with --judge CODE, which prints the nodes to leave out
and exits with 0 if the run is to be started again, else with 1.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lit_gpt.cli import EXIT_FAILURE, EXIT_OK, BadInput, Parser, require_at_least, run_program
from lit_gpt.launch.restarts import SIGNALLED, Decision, Restarts, take_cause

log = logging.getLogger(__name__)

LEFT_OVER_S = 15.0
PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""A signal that is ignored at the start (by nohup, say) stays ignored, by the command too."""


def parse() -> Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--restarts", type=int, default=3, help="at most so many restarts (default: %(default)s)")
    parser.add_argument("--spare_nodes", type=int, default=0, help="with --judge: nodes that the run did without")
    parser.add_argument("--nodes", type=int, default=1, help="with --judge: nodes of the job")
    parser.add_argument("--judge", type=int, metavar="CODE", help="exit code of a run that another program starts")
    parser.add_argument("--report", type=Path, help="with --judge: $RUN_REPORT of that run")
    parser.add_argument("command", nargs="*", help="after --: the command that starts the run")
    given = parser.parse_args()
    require_at_least(given, 0, "restarts", "spare_nodes", "nodes")
    if (given.judge is None) != (given.report is None) or (given.judge is None) != bool(given.command):
        raise BadInput("give a command after --, or --judge and --report")
    return given


def judge(folder: Path, code: int, restarts: int, nodes: int = 1, spare_nodes: int = 0) -> Decision:
    ended_at = time.time()
    known, cause = Restarts.remembered(folder, restarts, nodes, spare_nodes), take_cause(folder)
    decision = known.after(code, cause)
    known.remember(folder, cause["at"] if cause else ended_at, ended_at)
    log.log(logging.WARNING if decision.again else logging.INFO, "supervisor: %s", decision.why)
    return decision


def end_left_over_ranks(group: int) -> None:
    """Return when the command's process group is empty; what is there after LEFT_OVER_S (a stopped rank) is killed."""
    deadline = time.monotonic() + LEFT_OVER_S
    with suppress(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(group, 0)
            time.sleep(0.1)
        os.killpg(group, signal.SIGKILL)


def supervise(command: list[str], restarts: int) -> int:
    """Run the command until its end is final; returns its last exit code."""
    asked: list[int] = []
    undelivered: list[int] = []
    running: list[subprocess.Popen[bytes]] = []

    def deliver() -> None:
        while running and undelivered:
            running[0].send_signal(undelivered.pop(0))

    def pass_on(number: int, _: object) -> None:
        asked.append(number)
        undelivered.append(number)
        deliver()

    for number in PASSED_ON:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, pass_on)
    with tempfile.TemporaryDirectory(prefix="run-report-") as folder:
        environment = {**os.environ, "RUN_REPORT": folder}
        while True:
            process = subprocess.Popen(command, env=environment, start_new_session=True)
            running.append(process)
            deliver()  # what came while it started
            code = process.wait()
            running.clear()
            code = SIGNALLED - code if code < 0 else code
            if code == EXIT_OK or asked or not judge(Path(folder), code, restarts).again:
                return code
            end_left_over_ranks(process.pid)
            if asked:
                return code


def main() -> int:
    given = parse()
    if given.judge is None:
        return supervise(given.command, given.restarts)
    decision = judge(given.report, given.judge, given.restarts, given.nodes, given.spare_nodes)
    print(",".join(decision.left_out))
    return EXIT_OK if decision.again else EXIT_FAILURE


if __name__ == "__main__":
    run_program(main)
