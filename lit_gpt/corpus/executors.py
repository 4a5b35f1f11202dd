"""How the tasks of a job run on this machine: datatrove's pipelines, in the project's pool.

Invariants: a task that is done is not done again; a task publishes what it made before it counts as done.
"""

from __future__ import annotations

from collections import deque
from copy import deepcopy

import pyarrow as pa
from datatrove.executor.local import LocalPipelineExecutor
from loguru import logger

from lit_gpt.prepare.worker_pool import run_pool


class LocalExecutor(LocalPipelineExecutor):
    """datatrove's executor with the project's pool: that of multiprocess waits for ever for a worker that was killed,
    and its workers outlive a parent that was."""

    def run(self) -> None:
        ranks = self.get_incomplete_ranks()
        if ranks:
            for _ in run_pool(min(self.workers, len(ranks)), _RankWork, (self,), ranks):
                pass

    def run_ranks(self, ranks: list[int]) -> None:
        """Run these tasks here, but those that are done."""
        work = _RankWork(self)
        for rank in ranks:
            work(rank)


class _RankWork:
    def __init__(self, executor: LocalExecutor) -> None:
        logger.disable("datatrove")  # it says on the screen what the job's folder says too
        pa.set_memory_pool(pa.system_memory_pool())  # the usual one keeps what tasks free: it would add up over a pass
        self._executor = executor

    def __call__(self, rank: int) -> None:
        executor = deepcopy(self._executor)
        if executor.is_rank_completed(rank):
            return
        data = None
        for step in executor.pipeline:
            data = step(data, rank, executor.world_size)
        deque(data or (), maxlen=0)
        executor.mark_rank_as_completed(rank)  # and no log of its own: to set that up takes longer than a small task

    def finish(self) -> None:
        return None
