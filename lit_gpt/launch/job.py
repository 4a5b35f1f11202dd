"""What Slurm tells a run, and what the run tells Slurm's batch script: an exit code, and a request to be requeued.

Outside a Slurm job a run has no time limit, and a clean stop is exit code 0. In launch/ only this module,
site.py, world.py, meeting.py and compile_cache.py read the environment.
"""

from __future__ import annotations

import json
import os
import socket
import time
from dataclasses import asdict
from pathlib import Path

from lit_gpt.cli import EXIT_FAILURE, EXIT_OK, EXIT_REQUEUE
from lit_gpt.launch.cause import CAUSE_FILE, MEMORY_FILE, Cause

PARENT = "LIT_GPT_PARENT"
"""Variable with the number of the process that has started this one as a further rank."""
_PARENT_ENDS_S = 60.0


def end_after_parent() -> None:
    """Return when the rank that has started this one, if any has, has ended, or after a minute.

    Lightning kills a rank within 5 s of the end of one that it started, if that had another exit code than 0. The exit
    code of the whole would be lost, and what rank 0 does last, such as sending metrics.
    """
    parent, began = os.environ.get(PARENT), time.monotonic()
    while str(os.getppid()) == parent and time.monotonic() - began < _PARENT_ENDS_S:
        time.sleep(0.1)


def exit_code_after_stop() -> int:
    """Exit code of a run that saved and stopped early: inside a Slurm job, the one that asks for a requeue."""
    return EXIT_REQUEUE if "SLURM_JOB_ID" in os.environ else EXIT_OK


def exit_code_after_stall() -> int:
    """Exit code of a run that the watchdog ends: inside a Slurm job, the one that asks for a requeue."""
    return EXIT_REQUEUE if "SLURM_JOB_ID" in os.environ else EXIT_FAILURE


def ask_for_requeue() -> None:
    """Create the file $REQUEUE_FILE, if the batch script has set it: the request of a run that the watchdog ends.

    An exit code would be lost: srun reports the highest of all ranks, which is that of the rank it has to kill (137).
    """
    if name := os.environ.get("REQUEUE_FILE"):
        Path(name).touch()


def last_fault() -> dict[str, float] | None:
    """When the fault that this start mends was found, and when its ranks had ended: `at` and `ended_at`, epoch seconds.

    None if this is no restart, as far as the supervisor's folder $RUN_REPORT says.
    """
    name = os.environ.get("RUN_REPORT")
    if not name or not (memory := Path(name) / MEMORY_FILE).exists():
        return None
    fault: dict[str, float] = json.loads(memory.read_text())["last_fault"]
    return fault


def report_cause(cause: Cause) -> None:
    """Write why the run fails to the folder $RUN_REPORT, if a supervisor has set it: restarts.py reads it."""
    if name := os.environ.get("RUN_REPORT"):
        (Path(name) / CAUSE_FILE).write_text(json.dumps(asdict(cause)))


def seconds_left() -> float | None:
    """Seconds until Slurm ends the job, by SLURM_JOB_END_TIME (from Slurm or the batch script); None without it."""
    end = os.environ.get("SLURM_JOB_END_TIME", "")
    return int(end) - time.time() if end.isdigit() else None


def node() -> str:
    """This machine's name as Slurm has it, else its own."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def host() -> str:
    """This machine's name and, inside a Slurm job, the node's number in it."""
    node = os.environ.get("SLURM_NODEID")
    return socket.gethostname() + ("" if node is None else f", node {node} of the job")
