"""How tests run a program to its end: forked from a process that has its imports, or in a fresh interpreter."""

from __future__ import annotations

import atexit
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[2]
READ_AT_IMPORT = ("PYTHON", "LD_", "OMP_", "MKL_", "TORCH", "PYTORCH", "CUDA", "CUBLAS", "TRITON", "HF_", "TOKENIZERS_")
"""Prefixes of environment variables that a package may read when it is imported."""
SITE = ("MODEL_NAME", "TRAIN_DATA_DIR", "VAL_DATA_DIR", "TOKENIZER_PATH", "CACHE_DIR", "CONFIG")
"""Variables of a site file, which the training program reads."""


def environment(**extra: str) -> dict[str, str]:
    """The environment of this process, but one thread per process, and no trace of a launcher (Slurm, torchrun)."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "TORCHELASTIC_")) and k not in SITE}
    return {**clean, "OMP_NUM_THREADS": "1", **extra}


INTERRUPTIBLE = ("env", "--default-signal=INT")
"""Begins a command that a test ends by SIGINT, which the children of a shell's background process would ignore."""


def run_program(
    command: Sequence[object], *, env: Mapping[str, str] | None = None, cwd: Path | None = None, timeout_s: float = 300,
    fresh: bool = False,
) -> subprocess.CompletedProcess[str]:  # fmt: skip
    """Run `python PROGRAM [argument ...]` to its end; returns its exit code and output. Default of env: environment().

    fresh: in a new interpreter, for tests of how a program starts, and of several processes. A program of another
    checkout also runs so, and one with variables that packages may have read when the server imported them.
    """
    python, program, *arguments = map(str, command)
    assert python == sys.executable
    values = dict(environment() if env is None else env)
    if fresh or not Path(program).resolve().is_relative_to(ROOT) or _differs(values):
        return subprocess.run(
            [python, program, *arguments], env=values, cwd=cwd, capture_output=True, text=True, timeout=timeout_s,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    return _server().run([program, *arguments], [values], cwd or Path.cwd(), timeout_s)


def start_program(
    command: Sequence[object], *, stderr: int | IO[Any] = subprocess.DEVNULL, **variables: str
) -> StartedProgram:
    """Start `python PROGRAM [argument ...]` with environment(**variables), for a test that looks at it while it runs.

    Its parent is no process of the test, so it is for one process that starts no ranks.
    """
    python, program, *arguments = map(str, command)
    values = environment(**variables)
    assert python == sys.executable
    assert Path(program).resolve().is_relative_to(ROOT)
    assert not _differs(values)
    with open(os.devnull, "r+") as nothing:
        files = [nothing.fileno(), nothing.fileno(), nothing.fileno() if isinstance(stderr, int) else stderr.fileno()]
        return StartedProgram(_server().start([program, *arguments], [values], Path.cwd(), files))


class StartedProgram:
    """The part of subprocess.Popen that tests use, for a child of the fork server."""

    def __init__(self, answers: socket.socket) -> None:
        self._answers = answers
        (self.pid,) = json.loads(_answer(answers))
        self.returncode: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code; -n if signal n ended it. Raises TimeoutError."""
        if self.returncode is None:
            self._answers.settimeout(timeout)
            (status,) = json.loads(_answer(self._answers))
            self.returncode = os.waitstatus_to_exitcode(status)
            self._answers.close()
        return self.returncode

    def poll(self) -> int | None:
        """Its exit code, or None while it runs."""
        try:
            return self.wait(0)
        except BlockingIOError:
            return None

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run_ranks(
    command: Sequence[object], ranks: int, *, nodes: int = 1, timeout_s: float = 300, **variables: str
) -> subprocess.CompletedProcess[str]:
    """`run_program` for a program that torchrun starts `ranks` times on this machine, with `variables`; the outputs are
    one, and the exit code is that of the first rank that has another than 0.

    nodes: the machine stands for so many, named n0, n1 ..., which share its disks and memory."""
    _, program, *arguments = map(str, command)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    there = dict(TORCHELASTIC_RUN_ID="x", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    there |= dict(WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks // nodes))
    places = []
    for rank in range(ranks):
        node, local = divmod(rank, ranks // nodes)
        place = dict(RANK=str(rank), LOCAL_RANK=str(local), GROUP_RANK=str(node))
        name = {"SLURMD_NODENAME": f"n{node}"} if nodes > 1 else {}
        places.append(environment(**variables, **there, **place, **name))
    return _server().run([program, *arguments], places, Path.cwd(), timeout_s)


def call_on_ranks(function: Callable[[int, Path], None], folder: Path, ranks: int) -> None:
    """Call function(rank, folder) on so many gloo ranks."""
    program = ROOT / "tests" / "support" / "rank_function.py"
    done = run_ranks([sys.executable, program, function.__module__, function.__name__, folder], ranks)
    assert done.returncode == 0, done.stderr


def _differs(env: Mapping[str, str]) -> bool:
    ours = environment()
    return any(env.get(name) != ours.get(name) for name in {*env, *ours} if name.startswith(READ_AT_IMPORT))


class _ForkServer:
    """The client of tests/support/fork_server.py; the server ends with this process."""

    def __init__(self) -> None:
        self._connection, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from tests.support import fork_server as f; f.serve"
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"{code}({theirs.fileno()})"], env=environment(), pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL, cwd=ROOT,
        )  # fmt: skip
        theirs.close()
        atexit.register(self.close)

    def close(self) -> None:
        self._connection.close()
        self._process.wait()

    def run(
        self, argv: list[str], envs: list[dict[str, str]], cwd: Path, timeout_s: float
    ) -> subprocess.CompletedProcess[str]:
        with open(os.devnull) as stdin, tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
            answers = self.start(argv, envs, cwd, [stdin.fileno(), stdout.fileno(), stderr.fileno()])
            children = json.loads(_answer(answers))
            timer = threading.Timer(timeout_s, lambda: [os.kill(child, signal.SIGKILL) for child in children])
            timer.start()
            codes = [os.waitstatus_to_exitcode(status) for status in json.loads(_answer(answers))]
            answers.close()
            too_late = timer.finished.is_set()
            timer.cancel()
            texts = []
            for file in (stdout, stderr):
                file.seek(0)
                texts.append(file.read().decode())
        if too_late:
            raise subprocess.TimeoutExpired(argv, timeout_s, *texts)
        return subprocess.CompletedProcess([sys.executable, *argv], next(filter(None, codes), 0), *texts)

    def start(self, argv: list[str], envs: list[dict[str, str]], cwd: Path, files: Sequence[int]) -> socket.socket:
        """Start a child with each of the environments; from the socket come their process ids, then their statuses."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        request = json.dumps({"argv": argv, "cwd": str(cwd), "envs": envs}).encode()
        socket.send_fds(self._connection, [request], [*files, theirs.fileno()])
        theirs.close()
        return ours


def _answer(answers: socket.socket) -> bytes:
    answer = answers.recv(1024)
    assert answer, "the fork server ended; its stderr stands above"
    return answer


@functools.cache
def _server() -> _ForkServer:
    """The server for all tests of this process."""
    return _ForkServer()


def executable(path: Path, text: str) -> Path:
    """A bash script at `path`."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)
    return path
