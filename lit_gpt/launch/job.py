"""What the batch system tells a run about itself, and what the run answers: an exit code, and a request to come again.

Outside a Slurm job there is no end of the job, and a clean stop is exit code 0. Reads the environment, as world.py
does, and no other module.
"""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

from lit_gpt.cli import EXIT_FAILURE, EXIT_OK, EXIT_REQUEUE


def exit_code_after_stop() -> int:
    """What a run that saved and stopped at a signal exits with: in a Slurm job, the code that asks for a requeue."""
    return EXIT_REQUEUE if "SLURM_JOB_ID" in os.environ else EXIT_OK


def exit_code_after_stall() -> int:
    """What a run exits with that is ended because a rank hangs: a requeue is worth a try, if somebody can requeue."""
    return EXIT_REQUEUE if "SLURM_JOB_ID" in os.environ else EXIT_FAILURE


def ask_for_requeue() -> None:
    """For a run whose ranks do not all end by themselves: srun reports the highest exit code, and that of a rank that
    it had to kill is higher than ours. The batch script names the file that says it instead."""
    if name := os.environ.get("REQUEUE_FILE"):
        Path(name).touch()


def seconds_left() -> float | None:
    """Until Slurm ends the job (SLURM_JOB_END_TIME, from Slurm or the batch script); None where nobody says when."""
    end = os.environ.get("SLURM_JOB_END_TIME", "")
    return int(end) - time.time() if end.isdigit() else None


def host() -> str:
    """This machine's name, with its number in the job."""
    node = os.environ.get("SLURM_NODEID")
    return socket.gethostname() + ("" if node is None else f", node {node} of the job")
