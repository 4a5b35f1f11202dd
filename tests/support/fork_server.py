"""Runs programs without the seconds of their imports: a process that has imported everything forks for each run.

The child acts as a new interpreter: it runs the program's file as `__main__` with its own arguments, folder,
environment, stdin, stdout and stderr, and Python ends it as usual, with exit code, atexit handlers and tracebacks. So
that forking is safe, the server has not initialized CUDA and has no threads but those of jemalloc (pyarrow's
allocator), which jemalloc restarts in a child.
"""

from __future__ import annotations

import builtins
import gc
import importlib.util
import json
import logging
import os
import pkgutil
import random
import socket
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = (
    "yaml", "pandas", "torch.utils.tensorboard", "transformers.models.auto",
    "transformers.models.llama",
)  # fmt: skip
"""Imported beside what lit_gpt's modules import. pyarrow's first table imports pandas, if installed."""
LARGEST_REQUEST_BYTES = 1 << 20


def preload() -> None:
    """Import what programs import, with logging set up, as in a program (lit_gpt.cli.run_program)."""
    handler = logging.NullHandler()  # without one, lightning gives its loggers handlers of their own
    logging.getLogger().addHandler(handler)
    import lit_gpt

    modules = [module.name for module in pkgutil.walk_packages(lit_gpt.__path__, "lit_gpt.") if not module.ispkg]
    for name in sorted(modules):
        if ".bench." not in name and not name.endswith("_triton"):
            importlib.import_module(name)
    for name in PACKAGES:
        if importlib.util.find_spec(name.partition(".")[0]):
            importlib.import_module(name)
    logging.getLogger().removeHandler(handler)


def serve(descriptor: int) -> None:
    """Obey requests until the other end is closed; a child never returns from here.

    A request is one message: JSON of argv, cwd and envs (one child for each, at the same time), with the three files
    and a socket for its answers: the children's process ids, then their statuses from os.waitpid. A process of its own
    starts the children and waits for them, so that several requests may be under way.
    """
    connection = socket.socket(fileno=descriptor)
    path = [entry for entry in sys.path if entry != str(ROOT) or entry in os.environ.get("PYTHONPATH", "").split(":")]
    own = Path("/proc/self/comm").read_text().strip()
    preload()
    gc.collect()
    gc.freeze()  # so that a child's collector does not touch, and copy, the shared pages
    threads = {path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")} - {own, "jemalloc_bg_thd"}
    assert not threads, f"threads after the imports: {threads}; a fork would not be safe"
    keepers: list[int] = []
    while True:
        message, files, _, _ = socket.recv_fds(connection, LARGEST_REQUEST_BYTES, 4)
        if not message:
            sys.exit()
        if (keeper := os.fork()) == 0:
            connection.close()
            keep(json.loads(message), files[:3], socket.socket(fileno=files[3]), path)
        for file in files:
            os.close(file)
        keepers.append(keeper)
        keepers = [keeper for keeper in keepers if os.waitpid(keeper, os.WNOHANG)[0] == 0]


def keep(request: dict[str, Any], files: list[int], answers: socket.socket, path: list[str]) -> NoReturn:
    """Start a request's children, and say how they ended."""
    children = []
    for env in request["envs"]:
        child = os.fork()
        if child == 0:
            answers.close()
            for number, file in enumerate(files):
                os.dup2(file, number)
                os.close(file)
            run(request["argv"], request["cwd"], env, path)
        children.append(child)
    for file in files:
        os.close(file)
    try:
        answers.send(json.dumps(children).encode())
        answers.send(json.dumps([os.waitpid(child, 0)[1] for child in children]).encode())
    finally:
        os._exit(0)  # the other end may be gone


def run(argv: list[str], cwd: str, env: dict[str, str], path: list[str]) -> NoReturn:
    """What the interpreter does for `python PROGRAM ...`; exits as the program does."""
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    tempfile.tempdir = None  # TMPDIR may be another
    random.seed()
    sys.argv = argv
    sys.orig_argv = [sys.executable, *argv]
    sys.path[:] = [str(Path(argv[0]).resolve().parent), *path]
    main = ModuleType("__main__")
    main.__dict__.update(__file__=argv[0], __builtins__=builtins)
    sys.modules["__main__"] = main
    exec(compile(Path(argv[0]).read_bytes(), argv[0], "exec"), main.__dict__)
    sys.exit()
