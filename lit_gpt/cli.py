"""What every program of the project shares: how it parses, how it logs, and how it ends.

A user's mistake is a `BadInput`: one line that says what, where, and the valid choices; no traceback, exit code 2.
A disk that fails at a file that is known is one line too, with exit code 1.
Any other exception is a bug or a broken machine and keeps its traceback.
"""

from __future__ import annotations

import argparse
import errno
import itertools
import logging
import os
import re
import shlex
import sys
import textwrap
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from lit_gpt.noise import silence
from lit_gpt.values import did_you_mean, expand_path, read_number, read_whole

EXIT_OK = 0
EXIT_FAILURE = 1
EXIT_BAD_INPUT = 2
EXIT_GAVE_UP = 3
"""Training stopped itself: too many updates in a row were skipped, or too many rollbacks. The state is saved."""
EXIT_NOT_SAVED = 74
"""EX_IOERR of sysexits.h: the run ended, but its last checkpoint could not be saved; earlier ones are whole."""
EXIT_REQUEUE = 75
"""EX_TEMPFAIL of sysexits.h: the state is saved, and the run wants to be started again."""
EXIT_ABORTED = 130
"""128 + SIGINT, as shells have it: a second Ctrl-C ended the run, which has not saved."""


ROOT = Path(__file__).resolve().parents[1]

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
DISK_FAILURES = (*NO_ROOM, errno.EIO, errno.EROFS, errno.ESTALE)
"""What a disk does to a program that is right. Where the error names its file, a line says all."""


DASHES = "-\u2013\u2014"
"""Also those that a word processor makes of two hyphens."""
FLAG = re.compile("--|-[a-zA-Z]|[\u2013\u2014]")


class BadInput(ValueError):
    """A user's mistake; the message is one line: what is wrong, where, and what would be right."""


class KnownBadInput(BadInput):
    """One that every rank of the run has learned of, so that all end by themselves; rank 0 raises it."""


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


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Fills a description's paragraphs to the width of the terminal; indented lines and lists stay as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        lines: list[str] = []
        for flows, group in itertools.groupby(text.splitlines(), lambda line: line[:1] not in ("", " ", "-")):
            part = list(group)
            lines += textwrap.wrap(" ".join(part), width, break_on_hyphens=False) if flows else part
        return "\n".join(indent + line for line in lines)


class Parser(argparse.ArgumentParser):
    """An argparse parser for which every mistake is a BadInput, and which accepts no abbreviated flag.

    Arguments of type int, float, Path and "path" (a str) are read as settings are (values.py): 1e3 is whole, ~ is the
    home folder, $NAME a variable.
    """

    def __init__(self, description: str | None, **options: Any) -> None:
        summary = (description or "").strip()
        super().__init__(description=summary, allow_abbrev=False, formatter_class=HelpFormatter, **options)
        kinds = {int: read_whole, float: read_number, "path": expand_path, Path: lambda text: Path(expand_path(text))}
        for kind, read in kinds.items():
            self.register("type", kind, _argument_type(read))

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, but refuses an unknown flag before anything else, and says what may have been meant."""
        given = list(sys.argv[1:] if args is None else args)
        for word in given[: given.index("--")] if "--" in given else given:
            flag = word.split("=")[0]
            if flag not in self._option_string_actions and FLAG.match(flag):
                self.error(f"no flag {flag}{did_you_mean(flag.strip(DASHES), self.flags(), '--')}")
        return super().parse_known_args(given, namespace)

    def flags(self) -> list[str]:
        """The names of all flags, without their dashes."""
        return [flag.removeprefix("--") for flag in self._option_string_actions if flag.startswith("--")]

    def error(self, message: str) -> NoReturn:
        raise BadInput(f"{message} (--help lists the arguments)")


def _argument_type(read: Callable[[str], Any]) -> Callable[[str], Any]:
    """`read` as a type of argparse, which shows no message of a ValueError."""

    def typed(text: str) -> Any:
        try:
            return read(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r} {error}") from None

    return typed


def command_line(program: str, *words: str | Path) -> str:
    """A command to paste into a shell in the present folder; program: such as "scripts/generate.py"."""
    interpreter = "bash" if program.endswith(".sh") else "python"
    return shlex.join([interpreter, checkout_path(program), *map(str, words)])


def checkout_path(name: str) -> str:
    """A file of this checkout, seen from the present folder in the way that this program was called, or a shorter one.

    name: from the checkout's root."""
    called = Path(sys.argv[0]).parent.parent / name
    paths = [str(called)] if called.exists() and called.samefile(ROOT / name) else []
    return min([*paths, str(ROOT / name), os.path.relpath(ROOT / name)], key=len)


def say_loading(what: object, *packages: str) -> None:
    """Say what the next seconds are for; called before the first import of packages that take so long.

    what: the model, file or measurement that the packages are for."""
    logging.getLogger(__name__).info("%s: loading %s", what, " and ".join(packages))


def end_failed(where: str, error: Exception, then: Callable[[], None]) -> NoReturn:
    """End this process with EXIT_FAILURE, after the traceback, a last line that says what failed, and `then`."""
    try:
        traceback.print_exception(error)
        logging.getLogger(__name__).error("%s: %s: %s", where, type(error).__name__, " ".join(str(error).split()))
    finally:  # also where the screen is a file on a full disk
        end_at_once(EXIT_FAILURE, then)


def end_at_once(exit_code: int, then: Callable[[], None]) -> NoReturn:
    """End this process after `then`, for one of several: an orderly end would wait for the others, which wait for this
    one (NCCL's groups do, when they are destroyed)."""
    try:
        logging.shutdown()
        sys.stdout.flush()
        then()
    finally:
        os._exit(exit_code)


class _Screen(logging.StreamHandler):
    """Writes to what sys.stderr is at the time: a progress bar replaces it, so that lines go above the bar."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> Any:
        return sys.stderr


def print_bad_input(error: BadInput) -> None:
    """The one line on stderr that a BadInput becomes."""
    print(f"{sys.argv[0]}: error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)


def run_program(main: Callable[[], int | None]) -> NoReturn:
    """Run `main` and exit with its code (None is 0); a BadInput becomes one line on stderr and exit code 2."""
    form = "%(asctime)s %(levelname)s %(message)s"
    logging.basicConfig(level=logging.INFO, format=form, datefmt="%Y-%m-%d %H:%M:%S", handlers=[_Screen()])
    silence()
    try:
        code = main()
    except BadInput as error:
        print_bad_input(error)
        sys.exit(EXIT_BAD_INPUT)
    except BrokenPipeError:  # the program that reads our output (head, less) has ended
        sys.stderr.close()
        sys.exit(EXIT_OK)
    except OSError as error:
        if error.errno not in DISK_FAILURES or error.filename is None:
            raise
        print(f"{sys.argv[0]}: error: {error.filename}: {error.strerror}", file=sys.stderr)
        sys.exit(EXIT_FAILURE)
    sys.exit(code or EXIT_OK)
