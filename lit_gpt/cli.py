"""What every program of the project shares: how it parses, how it logs, and how it ends.

A user's mistake is a `BadInput`: one line that says what, where, and the valid choices; no traceback, exit code 2.
Any other exception is a bug or a broken machine and keeps its traceback.
"""

from __future__ import annotations

import argparse
import inspect
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NoReturn, TypeVar

EXIT_OK = 0
EXIT_FAILURE = 1
EXIT_BAD_INPUT = 2
EXIT_GAVE_UP = 3
"""Training stopped itself: too many updates in a row were skipped, or too many rollbacks. The state is saved."""
EXIT_NOT_SAVED = 74
"""EX_IOERR of sysexits.h: the run ended, but its last checkpoint could not be saved; earlier ones are whole."""
EXIT_REQUEUE = 75
"""EX_TEMPFAIL of sysexits.h: the state is saved, and the run wants to be started again."""


class BadInput(ValueError):
    """A user's mistake; the message is one line: what is wrong, where, and what would be right."""


@dataclass(frozen=True)
class SettingsSlice:
    """Settings that one part of a program reads; a program's settings inherit from all slices that it needs.

    A slice that refuses values overrides `check` and calls super().check() first, so every slice is checked.
    """

    def check(self) -> None:
        """Raise BadInput for values that are out of range or contradict each other."""

    def require_at_least(self, least: int, *names: str) -> None:
        """Refuse settings below `least`; None, which stands for a default, passes."""
        require_at_least(self, least, *names)

    def require_above(self, bound: float, *names: str) -> None:
        """Refuse settings that are not above `bound`; None passes."""
        _require(self, names, lambda value: value > bound, f"must be above {bound}")

    def require_not_negative(self, *names: str) -> None:
        """Refuse settings below 0, and NaN; None passes."""
        _require(self, names, lambda value: value >= 0, "must not be negative")


def require_at_least(values: object, least: float, *names: str) -> None:
    """Raise BadInput if a named attribute of `values` (settings or parsed arguments) is below `least`; None passes."""
    _require(values, names, lambda value: value >= least, f"must be at least {least}")


def _require(values: object, names: Sequence[str], holds: Callable[[Any], bool], range_: str) -> None:
    for name in names:
        value = getattr(values, name)
        if value is not None and not holds(value):
            raise BadInput(f"--{name} {value}: {range_}")


Slice = TypeVar("Slice", bound=SettingsSlice)


class Parser(argparse.ArgumentParser):
    """An argparse parser that raises BadInput for what it cannot parse and accepts no abbreviated flag."""

    def __init__(self, description: str | None) -> None:
        summary = (description or "").strip()
        super().__init__(description=summary, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        raise BadInput(f"{message} (--help lists the arguments)")


def parse_settings(settings_type: type[Slice], argv: Sequence[str] | None, description: str | None) -> Slice:
    """Settings from dataclass defaults < YAML files (`--config`) < command line; raises BadInput.

    The flags are flat; `--help` groups them by slice.
    """
    import jsonargparse

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(description=description, exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file of settings; flags override it")
    for part in _slices(settings_type):
        parser.add_class_arguments(part, as_group=True)
    try:
        values = parser.parse_args(_spelled_out(sys.argv[1:] if argv is None else argv, settings_type)).as_dict()
    except (argparse.ArgumentError, TypeError, OSError) as error:
        raise BadInput(" ".join(str(error).split())) from None
    values.pop("config")
    return settings_type(**values)


def _slices(settings_type: type[SettingsSlice]) -> list[type[SettingsSlice]]:
    """The classes that settings_type is the sum of, in the order of its fields."""
    parts = [part for part in reversed(settings_type.__mro__) if inspect.get_annotations(part)]
    return [part for part in parts if issubclass(part, SettingsSlice)]


def config_files(argv: Sequence[str] | None = None) -> list[Path]:
    """The YAML files that --config names, in order; the command line must have been parsed without an error."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", action="append", type=Path, default=[])
    files: list[Path] = parser.parse_known_args(argv)[0].config
    return files


def _spelled_out(argv: Sequence[str], settings_type: type[Any]) -> list[str]:
    """The arguments, with `true` put after each bool flag that is given without a value."""
    switches = {f"--{field.name}" for field in fields(settings_type) if "bool" in str(field.type)}
    spelled: list[str] = []
    for argument, after in zip(argv, [*argv[1:], "--"], strict=True):
        spelled += [argument, "true"] if argument in switches and after.startswith("--") else [argument]
    return spelled


def end_failed(where: str, error: Exception) -> NoReturn:
    """End this process at once with EXIT_FAILURE, after the traceback and a last line that says what failed.

    For one process of several: an orderly end would wait for the others, which wait for this one.
    """
    traceback.print_exception(error)
    logging.getLogger(__name__).error("%s: %s: %s", where, type(error).__name__, " ".join(str(error).split()))
    logging.shutdown()
    sys.stdout.flush()
    os._exit(EXIT_FAILURE)


def run_program(main: Callable[[], int | None]) -> NoReturn:
    """Run `main` and exit with its code (None is 0); a BadInput becomes one line on stderr and exit code 2."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", datefmt="%Y-%m-%d %H:%M:%S")
    try:
        code = main()
    except BadInput as error:
        print(f"{sys.argv[0]}: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
    except BrokenPipeError:  # the program that reads our output (head, less) has ended
        sys.stderr.close()
        sys.exit(EXIT_OK)
    sys.exit(code or EXIT_OK)
