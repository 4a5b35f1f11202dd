"""The Slurm route: arrays for the tasks of a job, and between them a step, which finds what is done and submits more.

A step is the program itself on one core. It does what one task does for all parts, submits an array for the next job,
and a step after it, however its elements end: so what was killed runs again, rounds of paragraph_dedup need no plan,
and a step that fails says why and leaves nothing in the queue. datatrove's SlurmPipelineExecutor submits all jobs at
once: it has no rounds, must know the number of partitions in advance, and leaves jobs that can never start behind a
killed task.
Invariant: at most one step or array of a build runs at a time.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from lit_gpt.cli import ROOT, BadInput
from lit_gpt.corpus.executors import LocalExecutor
from lit_gpt.corpus.parts import Layout
from lit_gpt.corpus.settings import CorpusSettings
from lit_gpt.files import OWN_JSON_BYTES, read_json, write_json

PROGRAM = ROOT / "scripts/build_corpus.py"
STEP, TASK = "slurm-step", "slurm-task"
"""What Slurm's jobs call the program with."""
LOGS = "logs"
"""Folder of the corpus for what the jobs print."""
MOST_ELEMENTS = 1000
"""Of an array; Slurm's own default limit is 1001."""
MOST_VAIN = 2
"""Arrays of a job, one after the other, of which no task was done, after which the build ends."""

log = logging.getLogger(__name__)


class Submitted(Exception):
    """The rest is in Slurm's queue."""


class SlurmRoute:
    """The jobs of one build; `last` is what the step before submitted."""

    def __init__(self, layout: Layout, settings: CorpusSettings) -> None:
        self._layout, self._settings = layout, settings
        self._folder = layout.work / "slurm"
        self._queue = self._folder / "queue.json"
        self._last: dict[str, Any] = read_json(self._queue, OWN_JSON_BYTES) if self._queue.exists() else {"job": None}

    def waiting(self, *, is_step: bool) -> str | None:
        """What of this build is in the queue, in words. Raises BadInput if Slurm does not answer."""
        names = ("array",) if is_step else ("array", "step")
        numbers = [self._last[name] for name in names if name in self._last]
        alive = _queued() if numbers else set()
        found = [number for number in numbers if number in alive]
        if not found:
            return None
        words = f"in Slurm's queue as {' and '.join(found)}"
        if (name := self._last["job"]) is None:
            return words
        done = list((self._layout.logs(name) / "completions").glob("*"))
        return f"{words}; {name}: {len(done)} of {self._last['tasks']} tasks done"

    def start(self) -> str:
        """Submit the first step; returns its number."""
        self._folder.mkdir(exist_ok=True)
        (self._layout.root / LOGS).mkdir(exist_ok=True)
        write_json(self._folder / "settings.json", dataclasses.asdict(self._settings))
        return self._submit_step({"job": None}, None)

    def run(self, name: str, executor: LocalExecutor) -> None:
        """Submit the tasks that are not done, and raise Submitted; return if there are none.
        Raises BadInput if they were tried often enough."""
        left = executor.get_incomplete_ranks()
        last, self._last = self._last, {"job": None}  # what comes next was not submitted before
        if not left:
            return
        vain = last["vain"] + 1 if last["job"] == name and len(left) == len(self._array(name)["ranks"]) else 0
        if vain == MOST_VAIN:
            raise BadInput(self._failure(name, last["array"], left))
        elements = min(len(left), self._settings.tasks or MOST_ELEMENTS)
        write_json(self._folder / f"{name}.json", {"ranks": left, "elements": elements})
        throttle = f"%{self._settings.workers}" if self._settings.workers else ""
        array = self._sbatch(name, "%A_%a", [f"--array=0-{elements - 1}{throttle}"], TASK, name)
        queued = {"job": name, "tasks": executor.world_size, "array": array, "vain": vain}
        write_json(self._queue, queued)
        self._submit_step(queued, array)
        log.info("%s: %d of %d tasks submitted as %s", name, len(left), executor.world_size, array)
        raise Submitted

    def wait_for(self) -> None:
        """Submit a step after the array that is still in the queue: the step that submitted it was killed."""
        self._submit_step(self._last, self._last["array"])

    def _array(self, name: str) -> dict[str, Any]:
        return read_json(self._folder / f"{name}.json", OWN_JSON_BYTES)

    def _failure(self, name: str, array: str, left: list[int]) -> str:
        job = self._array(name)
        path = self._layout.root / LOGS / f"{name}-{array}_{job['ranks'].index(left[0]) % job['elements']}.log"
        lines = path.read_text(errors="replace").strip().splitlines() if path.exists() else []
        said = f" ({lines[-1]})" if lines else ""
        return (
            f"{name}: {len(left)} tasks fail again and again, the first as {path}{said}. What is done is kept: mend "
            "the cause, and give the same command again"
        )

    def _submit_step(self, queued: dict[str, Any], after: str | None) -> str:
        dependency = [f"--dependency=afterany:{after}"] if after else []
        step = self._sbatch("step", "%j", dependency, STEP)
        write_json(self._queue, {**queued, "step": step})
        return step

    def _sbatch(self, name: str, number: str, options: list[str], *words: str) -> str:
        """The number of a job that calls the program with these words and the corpus' folder."""
        settings, root = self._settings, self._layout.root.absolute()
        partition = [f"--partition={settings.slurm_partition}"] if settings.slurm_partition else []
        return _slurm(
            "sbatch", "--parsable", f"--job-name=corpus-{name}", f"--output={root}/{LOGS}/{name}-{number}.log",
            "--open-mode=append", "--ntasks=1", "--cpus-per-task=1", f"--mem={settings.slurm_memory_gb}G",
            f"--time={settings.slurm_time}", "--requeue", *partition, *options,
            *(f"--{option}" for option in settings.slurm_options),
            f"--wrap=exec {shlex.join([sys.executable, str(PROGRAM), *words, str(root)])}",
        ).strip().split(";")[0]  # fmt: skip


def step_settings(folder: Path) -> CorpusSettings:
    """What the build in that folder was started with."""
    return CorpusSettings(**read_json(Layout(folder).work / "slurm/settings.json", OWN_JSON_BYTES))


def ranks_of_element(layout: Layout, name: str) -> list[int]:
    """The tasks of the array's element that this process is."""
    job = read_json(layout.work / f"slurm/{name}.json", OWN_JSON_BYTES)
    return job["ranks"][int(os.environ["SLURM_ARRAY_TASK_ID"]) :: job["elements"]]


def _queued() -> set[str]:
    """Numbers of this user's jobs, of arrays that of the whole."""
    return set(_slurm("squeue", "--noheader", "--me", "--format=%F").split())


def _slurm(*command: str) -> str:
    if shutil.which(command[0]) is None:
        raise BadInput(f"no {command[0]} here: call this on a login node of the cluster, outside any container")
    own = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_") or name == "SLURM_CONF"}
    done = subprocess.run(command, env=own, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BadInput(f"{command[0]}: {' '.join(done.stderr.split()) or f'ended with {done.returncode}'}")
    return done.stdout
