"""What every program of the project shares: how it parses, how it logs, and how it ends.

A user's mistake is a `BadInput`: one line that says what, where, and the valid choices; no traceback, exit code 2.
Any other exception is a bug or a broken machine and keeps its traceback.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, NoReturn, TypeVar

EXIT_OK = 0
EXIT_FAILURE = 1
EXIT_BAD_INPUT = 2
EXIT_GAVE_UP = 3
"""Training stopped itself: too many updates in a row could not be done. The state is saved."""
EXIT_NOT_SAVED = 74
"""EX_IOERR of sysexits.h: the run ended, but its last checkpoint could not be saved; earlier ones are whole."""
EXIT_REQUEUE = 75
"""EX_TEMPFAIL of sysexits.h: the work is saved, run me again."""

Settings = TypeVar("Settings")


class BadInput(ValueError):
    """A mistake of the user's, told in one line: what is wrong, where, and what would be right."""


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line and which never abbreviates a flag."""

    def __init__(self, description: str | None) -> None:
        summary = (description or "").strip()
        super().__init__(description=summary, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        raise BadInput(f"{message} (--help lists the arguments)")


def parse_settings(settings_type: type[Settings], argv: Sequence[str] | None, description: str | None) -> Settings:
    """Settings from dataclass defaults < YAML files (`--config`) < command line; raises BadInput."""
    import jsonargparse

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(description=description, exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file of settings; flags override it")
    parser.add_class_arguments(settings_type, as_group=False)
    try:
        values = parser.parse_args(_spelled_out(sys.argv[1:] if argv is None else argv, settings_type)).as_dict()
    except (argparse.ArgumentError, TypeError, OSError) as error:
        raise BadInput(" ".join(str(error).split())) from None
    values.pop("config")
    return settings_type(**values)


def _spelled_out(argv: Sequence[str], settings_type: type[Any]) -> list[str]:
    """The arguments with `true` after each flag of a bool setting that stands alone."""
    switches = {f"--{field.name}" for field in fields(settings_type) if "bool" in str(field.type)}
    spelled: list[str] = []
    for argument, after in zip(argv, [*argv[1:], "--"], strict=True):
        spelled += [argument, "true"] if argument in switches and after.startswith("--") else [argument]
    return spelled


def end_failed(where: str, error: Exception) -> NoReturn:
    """End at once, with the traceback and below it the line that somebody reads first.

    For one process of several: an orderly end would wait for others, which wait for this one.
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
    except BrokenPipeError:  # the reader of our output (head, less) has seen enough
        sys.stderr.close()
        sys.exit(EXIT_OK)
    sys.exit(code or EXIT_OK)
