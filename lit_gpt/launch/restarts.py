"""Whether a run that has ended is started again at once, in the same job, and which nodes are then left out.

A killed rank, a lost node and a failed GPU are mended by another start, which continues from the newest checkpoint; bad
input, a run that gave up and a stop from outside are not. What happened at which step comes from the cause that the
ranks wrote to $RUN_REPORT (lifeline.py). A fault that comes back at the same step is not one of a machine.

No torch, and nothing but the standard library: scripts/supervise.py starts in a tenth of a second.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lit_gpt.cli import EXIT_BAD_INPUT, EXIT_FAILURE
from lit_gpt.launch.cause import CAUSE_FILE, FAILED, MEMORY_FILE, SILENT

SIGNALLED = 128
MENDABLE = (EXIT_FAILURE, *(SIGNALLED + number for number in (6, 7, 8, 9, 11)))
"""Exit codes after which another start may help: a failure, or a death by SIGABRT, SIGBUS, SIGFPE, SIGKILL, SIGSEGV.
And any code where a silent rank is named."""
SAME_STEP = 3
"""So often may a run end at one step."""


@dataclass(frozen=True)
class Decision:
    """What becomes of a run that has ended."""

    again: bool
    why: str
    """One line for the log."""
    left_out: tuple[str, ...] = ()
    """Nodes that the next start shall do without."""


@dataclass
class Restarts:
    """The starts of one run in one job; remembered in a folder, as each decision may be made by a new process."""

    limit: int
    """Most restarts."""
    nodes: int = 1
    """Of the job; the last one is never left out."""
    spares: int = 0
    """Nodes of the job that the first start did without."""
    ends: list[dict[str, Any]] = field(default_factory=list)
    """For each end so far: the step it came at, the node that was named."""
    left_out: list[str] = field(default_factory=list)

    @classmethod
    def remembered(cls, folder: Path, limit: int, nodes: int, spares: int) -> Restarts:
        path = folder / MEMORY_FILE
        known = json.loads(path.read_text()) if path.exists() else {}
        return cls(limit, nodes, spares, known.get("ends", []), known.get("left_out", []))

    def remember(self, folder: Path, fault_at: float, ended_at: float) -> None:
        """fault_at, ended_at: when the last fault was found, and when the run had ended (job.last_fault)."""
        fault = {"at": fault_at, "ended_at": ended_at}
        known = {"ends": self.ends, "left_out": self.left_out, "last_fault": fault}
        (folder / MEMORY_FILE).write_text(json.dumps(known))

    def after(self, code: int, cause: dict[str, Any] | None) -> Decision:
        """Decide about a run that ended with this exit code (of a signal: 128 + its number).

        cause: what its ranks found. A node is left out if a spare takes its place, or if it is named a second time: the
        first may have been chance, and the run may not fit on fewer.
        """
        was_silent = cause is not None and cause["how"].startswith(SILENT)
        if not (code in MENDABLE or was_silent) or (cause is not None and cause["code"] == EXIT_BAD_INPUT):
            return Decision(False, f"ended with {code}, which another start does not mend")
        step = cause["step"] if cause and (cause["step"] or cause["place"] != "set-up") else None
        node = cause["node"] if cause else None
        what = f"{cause['name']} {cause['how']}" if cause else f"ended with {code}"
        self.ends.append({"step": step, "node": node})
        if len(self.ends) > self.limit:
            return Decision(False, f"{what}: {self.limit} restarts were made (RESTARTS)")
        at_step = sum(end["step"] == step for end in self.ends)
        if at_step >= SAME_STEP:
            where = f"in step {step + 1}" if step is not None else "in its set-up" if cause else "for an unknown reason"
            return Decision(False, f"{what}: the run ended {at_step} times {where}, so another start would not help")
        of_machine = cause is not None and not cause["how"].startswith(FAILED)
        if node is not None and of_machine and node not in self.left_out and len(self.left_out) < self.nodes - 1:
            named = sum(end["node"] == node for end in self.ends)
            if named > 1 or self.spares > len(self.left_out):
                self.left_out.append(node)
        without = f", without {', '.join(self.left_out)}" if self.left_out else ""
        return Decision(
            True, f"{what}: restart {len(self.ends)} of at most {self.limit}{without}", tuple(self.left_out)
        )


def take_cause(folder: Path) -> dict[str, Any] | None:
    """The cause that the ranks wrote, which is then gone: the next start writes its own."""
    path = folder / CAUSE_FILE
    try:
        cause = json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):  # they were killed before, or while they wrote it
        return None
    path.unlink()
    return dict(cause)
