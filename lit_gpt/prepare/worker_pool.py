"""A pool of processes whose workers keep state between tasks, such as a loaded tokenizer or a buffer to flush.

Invariants: a worker that dies, or a task that fails, ends the pool with an error; when the parent is killed, its
workers end at their next task. Workers ignore the signals that ask a program to stop: the parent decides. Results come
in no fixed order.
Costs: a worker starts as a fresh interpreter (0.5 s); tasks go through a pipe (about 1 GB/s).
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from lit_gpt.cli import DISK_FAILURES, BadInput
from lit_gpt.launch.signals import ignore_stop_signals, starting_helpers


class Worker(Protocol):
    """What runs in a process: called for each task, then `finish` once; both return a result for the parent."""

    def __call__(self, task: Any, /) -> Any: ...

    def finish(self) -> Any: ...


class _Failure(NamedTuple):
    message: str
    error: BadInput | OSError | None
    """What the parent raises as it is: a user's mistake, or a failing disk."""


def usable_cores() -> int:
    """Cores that this process may use, by its affinity, its cgroup and its Slurm task."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # not on macOS
    limits = [cores, *_cgroup_cores(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))]
    if (task := os.environ.get("SLURM_CPUS_PER_TASK", "")).isdigit():
        limits.append(int(task))
    return max(1, min(limits))


def _cgroup_cores(membership: Path, root: Path) -> Iterator[int]:
    """Cores that the quotas of this process's cgroup and those above it are worth, rounded up."""
    with contextlib.suppress(OSError):  # no Linux, or no /proc
        for line in membership.read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            if not controllers:  # cgroup v2
                base, names = root, ["cpu.max"]
            elif "cpu" in controllers.split(","):
                base, names = root / "cpu", ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
            else:
                continue
            here = base / group.lstrip("/")
            for folder in (here, *here.parents):
                with contextlib.suppress(OSError, ValueError):  # no limit set here
                    quota, period = (int(word) for name in names for word in (folder / name).read_text().split())
                    if quota > 0:
                        yield -(-quota // period)
                if folder == base:
                    break


def run_pool(
    workers: int, make_worker: Callable[..., Worker], arguments: tuple[Any, ...], tasks: Iterable[Any]
) -> Iterator[Any]:
    """Each task's result, and each worker's result of `finish`, as they come.

    `make_worker(*arguments)` is called in every process; both must be picklable. Tasks are drawn one ahead. One worker
    is this process itself. Raises BadInput and errors of the disk as a worker does, else RuntimeError for one
    that fails or dies.
    """
    if workers == 1:
        worker = make_worker(*arguments)
        yield from map(worker, tasks)
        yield worker.finish()
        return
    context = multiprocessing.get_context("spawn")  # fork would copy the locks of pyarrow's threads
    processes: dict[Connection, SpawnProcess] = {}
    try:
        with starting_helpers():
            for _ in range(workers):
                ours, theirs = context.Pipe()
                processes[ours] = context.Process(target=_serve, args=(theirs, make_worker, arguments), daemon=True)
                processes[ours].start()
                theirs.close()
        yield from _feed(processes, iter(tasks))
    finally:
        for connection, process in processes.items():
            connection.close()
            process.kill()  # a worker ignores SIGTERM
            process.join()


def _feed(processes: dict[Connection, SpawnProcess], tasks: Iterator[Any]) -> Iterator[Any]:
    ahead = next(tasks, None)
    busy, finishing = set(processes), set()

    def hand_out(connection: Connection) -> None:
        nonlocal ahead
        try:
            connection.send(ahead)  # None asks the worker to finish
        except OSError:
            raise _died(processes[connection]) from None
        if ahead is None:
            finishing.add(connection)
        else:
            ahead = next(tasks, None)

    for connection in processes:
        hand_out(connection)
    while busy:
        for ready in wait(list(busy)):
            assert isinstance(ready, Connection)
            result = _receive(ready, processes)
            if ready in finishing:
                busy.discard(ready)
            else:
                hand_out(ready)
            yield result


def _receive(connection: Connection, processes: dict[Connection, SpawnProcess]) -> Any:
    try:
        result = connection.recv()
    except (EOFError, OSError):
        raise _died(processes[connection]) from None
    if isinstance(result, _Failure):
        raise result.error or RuntimeError(f"in a worker:\n{result.message}")
    return result


def _died(process: SpawnProcess) -> RuntimeError:
    process.join()
    return RuntimeError(
        f"a worker process ended with code {process.exitcode} (-9 mostly means too little memory: use fewer workers)"
    )


def _serve(connection: Connection, make_worker: Callable[..., Worker], arguments: tuple[Any, ...]) -> None:
    ignore_stop_signals()
    try:
        worker = make_worker(*arguments)
        while (task := connection.recv()) is not None:
            connection.send(worker(task))
        connection.send(worker.finish())
    except (EOFError, ConnectionError):
        return  # the parent is gone
    except BadInput as error:
        connection.send(_Failure(str(error), error))
    except Exception as error:  # noqa: BLE001 (the parent raises it)
        disk = error if isinstance(error, OSError) and error.errno in DISK_FAILURES else None
        connection.send(_Failure(traceback.format_exc(), disk))
