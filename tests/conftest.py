"""Fixtures that all tests share, and how tests are spread over processes (pytest-xdist)."""

from __future__ import annotations

import fcntl
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.german_run import make_german_run
from tests.support.training import make_store

ROOT = Path(__file__).resolve().parents[1]
SCARCE = ("tests/gpu/", "tests/cluster/")
"""Folders whose tests share the one GPU, or mostly wait (Slurm, containers): the cores are for others meanwhile."""
BYTES_A_WORKER = 5 << 30
"""Memory for a worker and for the four ranks that a test may start."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """-n auto: one worker more than there are cores, as far as memory allows: tests of Slurm and signals wait long."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(len(os.sched_getaffinity(0)) + 1, memory // BYTES_A_WORKER))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """One worker runs all tests of a file, so that its fixtures are built once, and all of a folder of SCARCE."""
    from xdist.scheduler import LoadFileScheduling  # not needed where pytest runs in one process

    class FileScheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return next((folder for folder in SCARCE if file.startswith(folder)), file)

    return FileScheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run files with many slow tests first: else the worker that gets one last ends long after the others."""
    slow = Counter(item.path for item in items for mark in ("slow", "distributed") if item.get_closest_marker(mark))
    items.sort(key=lambda item: -slow[item.path])


def _once(tmp_path_factory: pytest.TempPathFactory, name: str, make: Callable[[Path], Path]) -> Path:
    """The result of make(folder), which the first worker calls; the others wait for it."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with (folder.with_suffix(".lock")).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = folder.with_suffix(".made")
        if not result.exists():
            folder.mkdir()  # fails if another worker's make failed; that worker's test shows why
            result.write_text(str(make(folder)))
        return Path(result.read_text())


@pytest.fixture(scope="session")
def shared() -> Path:
    """The developers' folder beside the checkout (tokenizer, German corpus); tests that need it skip without it."""
    folder = ROOT.parent / "shared"
    if not (folder / "tokenizer" / "tokenizer.json").is_file():
        pytest.skip("the developers' folder ../shared is not here")
    return folder


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stores train/ and val/ of tests/support/training.py; tests only read them."""
    return _once(tmp_path_factory, "store", make_store)


@pytest.fixture(scope="session")
def german_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder that tests/support/german_run.py makes; tests only read it."""
    return _once(tmp_path_factory, "german", make_german_run)
