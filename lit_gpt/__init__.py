"""LLäMmlein pretraining: rooms of files, one noun per file; docs/architecture.md is the tour.

Every program imports this file first, which tells in one line that it was started with another Python than that of its
environment. So this file needs no package, and no more than Python 3.7.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

__version__ = "0.1.0"

_ROOT = Path(__file__).resolve().parents[1]
_REQUIREMENTS = _ROOT / "requirements.txt"


def _refuse(problem: str) -> None:
    new = f"python3 -m venv .venv-train && .venv-train/bin/pip install -r {_REQUIREMENTS} (docs/installation.md)"
    way_out = f"start the program with the Python of its environment, or make one: {new}"
    print(f"{sys.argv[0]}: error: {problem}: {way_out}", file=sys.stderr)  # noqa: T201
    sys.exit(2)  # EXIT_BAD_INPUT of cli.py


def _tell_missing_package(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """An excepthook: one line where a package of requirements.txt is missing."""
    if isinstance(error, ModuleNotFoundError):
        package = str(error.name).partition(".")[0]
        named = re.compile(rf"(Py)?{re.escape(package)}\b", re.IGNORECASE)  # the package of PyYAML is yaml
        if any(named.match(line) for line in _REQUIREMENTS.read_text(encoding="utf-8").splitlines()):
            _refuse(f"{sys.executable} lacks the package {package}")
    sys.__excepthook__(kind, error, trace)


def _require_environment() -> None:
    """For a program of this checkout; those of others that import lit_gpt have their own words."""
    if Path(*sys.argv[:1]).resolve().parent.parent != _ROOT:
        return
    sys.excepthook = _tell_missing_package
    if sys.version_info < (3, 10):  # noqa: UP036
        _refuse(f"Python 3.10 to 3.14 is needed, {sys.executable} is {sys.version.split()[0]}")


_require_environment()
