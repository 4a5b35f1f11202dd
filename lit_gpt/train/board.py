"""TensorBoard's events of one attempt, in a file of their own.

Written as every log is (line_log.py): a line that cannot be written waits, and the training never depends on it. So the
package's writer, whose thread ends at the first failure, is not used, only its records.
Invariants: a line is in the file when `scalars` or `text` returns, so a killed run keeps it. The file's first event
purges later steps of earlier files, so what a resume or a rollback left is not shown.
Costs: one write a line.
"""

from __future__ import annotations

import io
import itertools
import os
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lit_gpt.datapoints.line_log import LineLog, or_alarm

_number = itertools.count()


class Board:
    """The events in a folder, from `first_step` on."""

    def __init__(self, folder: Path, first_step: int) -> None:
        or_alarm(folder, lambda: folder.mkdir(exist_ok=True))
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{next(_number)}"
        self._log = LineLog(folder / name)
        self._append(file_version="brain.Event:2")
        self._append(step=first_step, session_log={"status": "START"})

    def scalars(self, step: int, values: Mapping[str, float | int]) -> None:
        """Add a line of metrics."""
        from torch.utils.tensorboard import summary

        parts = [summary.scalar(name, value) for name, value in values.items()]
        self._append(step=step, summary={"value": [value for part in parts for value in part.value]})

    def hyperparameters(self, values: Mapping[str, Any], metrics: Sequence[str]) -> None:
        """Say what the run was started with, for the comparison of runs by these tags of scalars; None is left out."""
        from torch.utils.tensorboard import summary

        known = {name: value for name, value in values.items() if isinstance(value, (bool, int, float, str))}
        for part in summary.hparams(known, dict.fromkeys(metrics, 0.0)):
            self._append(summary=part)

    def text(self, step: int, name: str, markdown: str) -> None:
        """Add a text."""
        from torch.utils.tensorboard import summary

        self._append(step=step, summary=summary.text(name, markdown))

    def close(self) -> None:
        self._log.close()

    def _append(self, **event: Any) -> None:
        # takes a second, and is on request
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        record = io.BytesIO()
        RecordWriter(record).write(Event(wall_time=time.time(), **event).SerializeToString())
        self._log.append_bytes(record.getvalue())
