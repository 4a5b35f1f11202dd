"""A run's settings: defaults < the environment < YAML files (`--config`) < flags.

The fields of the settings' dataclasses are the flags and the keys; the docstring after a field is its help. A value is
read in the same way wherever it stands (values.py), and a mistake is told with the place where it stands. jsonargparse
makes --help out of the dataclasses, checks what was read against their types and fills in defaults.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import logging
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

import jsonargparse
import yaml

from lit_gpt.cli import DASHES, FLAG, BadInput, HelpFormatter, SettingsSlice
from lit_gpt.values import PathText, did_you_mean, read_value

Slice = TypeVar("Slice", bound=SettingsSlice)
log = logging.getLogger(__name__)

NULLS = ("", "~", "null", "Null", "NULL")
METAVARS = {int: "N", float: "X", str: "TEXT", PathText: "PATH", bool: "true|false"}
OTHER_FLAGS = ("help", "config", "print_config")
"""Flags that are no settings."""


class Given(NamedTuple):
    """What was written for a setting."""

    words: str | list[str]
    where: str
    """With the setting's name, for messages: "--max_steps", "run.yaml, line 3: max_steps", "$TRAIN_DATA_DIR"."""


def parse_settings(
    settings_type: type[Slice],
    argv: Sequence[str] | None,
    description: str | None,
    *,
    common: Sequence[str] = (),
    environment: Mapping[str, Given] | None = None,
    recipes: Sequence[Path] = (),
) -> tuple[Slice, list[Path]]:
    """The settings, and the YAML files that were read; raises BadInput. `check` is left to the caller.

    common: settings that --help lists first. environment: what the environment says of settings; its `config` counts
    where no --config is given. recipes: YAML files to suggest for a --config that is not there.
    """
    kinds = setting_types(settings_type)
    argv = sys.argv[1:] if argv is None else argv
    flags = read_flags(argv, kinds)
    parser = _parser(settings_type, kinds, description, common)
    if "help" in flags:
        parser.print_help()
        sys.exit()
    given = dict(environment or {})
    from_environment = given.pop("config", None)
    named = [Given(file, "--config") for file in flags.pop("config", [])]
    files = [_config_file(file, recipes) for file in named or ([from_environment] if from_environment else [])]
    for file in files:
        given |= read_yaml(file, kinds)
    taken = [from_environment] if from_environment and not named else []
    shown = flags.pop("print_config", None)
    given |= {name: Given(_unlisted(words, kinds[name]), f"--{name}") for name, words in flags.items()}
    checked = parser.parse_object({name: _value(kinds[name], entry) for name, entry in given.items()}).as_dict()
    settings = settings_type(**{name: checked[name] for name in kinds})
    taken += [entry for name, entry in given.items() if entry is (environment or {}).get(name)]
    if taken:
        log.info("from the environment: %s", ", ".join(f"{entry.where} {entry.words}" for entry in taken))
    if shown is not None:
        print(yaml.safe_dump(dataclasses.asdict(settings), sort_keys=False, allow_unicode=True), end="")  # noqa: T201
        sys.exit()
    return settings, files


def read_flags(argv: Sequence[str], kinds: Mapping[str, Any]) -> dict[str, list[str]]:
    """Name of each flag -> the words given for it; those of a repeated flag add up. Raises BadInput.

    A flag without a word stands for `true` where its setting is a switch.
    """
    flags: dict[str, list[str]] = {}
    for flag, words in _flags_and_words(argv):
        name = {"-h": "help"}.get(flag) or (flag[2:] if flag[2:] in kinds or flag[2:] in OTHER_FLAGS else None)
        if name is None:
            known = did_you_mean(flag.strip(DASHES), [*kinds, *OTHER_FLAGS], "--")
            raise BadInput(f"no flag {flag}{known} (--help lists the arguments)")
        least, most = _words_of_a_flag(kinds[name]) if name in kinds else ((1, 1) if name == "config" else (0, 0))
        if len(words) < least:
            raise BadInput(f"{flag}: expects a value (--help lists the arguments)")
        if len(words) > most:
            raise _value_of_no_flag(words[most], flag, words[:most])
        words = words or (["true"] if name in kinds else [])
        adds_up = name == "config" or most > 1
        flags[name] = flags.get(name, []) + words if adds_up else words
    return flags


def _flags_and_words(argv: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    starts = [number for number, word in enumerate(argv) if FLAG.match(word)]
    if argv and (not starts or starts[0] > 0):
        raise _value_of_no_flag(argv[0])
    for start, end in zip(starts, [*starts, len(argv)][1:], strict=True):
        flag, equals, word = argv[start].partition("=")
        yield flag, [word] * bool(equals) + list(argv[start + 1 : end])


def _value_of_no_flag(word: str, flag: str = "", before: Sequence[str] = ()) -> BadInput:
    """word: what stands where no value belongs, after `flag` and its own values `before`."""
    hint = " (--help lists the flags)"
    if word.endswith((".yaml", ".yml")):
        hint = f"; did you mean --config {word}?"
    elif word.partition("=")[0].isidentifier() and "=" in word:
        hint = f"; did you mean --{word}?"
    elif len(before) == 1 and before[0].isdecimal() and word.isdecimal() and len(word) == 3:  # thousands, set apart
        hint = f"; did you mean {flag} {before[0]}{word}?"
    return BadInput(f"{word}: the value of no flag{hint}")


def _words_of_a_flag(kind: Any) -> tuple[int, int]:
    """The fewest and the most words that a flag of this type takes."""
    kinds = [kind, *get_args(kind)] if kind is not PathText else [kind]
    if any(get_origin(one) is list for one in kinds):
        return 1, sys.maxsize
    return (0 if bool in kinds else 1), 1


def given_flags(argv: Sequence[str] | None = None) -> frozenset[str]:
    """Names of the settings that the command line itself gives; parse_settings must have read it without an error."""
    words = sys.argv[1:] if argv is None else argv
    return frozenset(word.partition("=")[0].removeprefix("--") for word in words if word.startswith("--"))


def setting_types(settings_type: type[SettingsSlice]) -> dict[str, Any]:
    """Name of each setting -> its type, as values.read_value takes it."""
    hints = get_type_hints(settings_type, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(settings_type)}


def read_yaml(path: Path, kinds: Mapping[str, Any]) -> dict[str, Given]:
    """What a YAML file says of settings, as text: YAML's own types are not asked for. Raises BadInput."""
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except OSError as error:
        raise BadInput(f"--config {path}: {error.strerror}") from None
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise BadInput(f"{path}{line}: this is not YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise BadInput(f"{path}: this is not YAML: {error}") from None
    if root is None:  # an empty file
        return {}
    if not isinstance(root, yaml.MappingNode):
        raise BadInput(f"{path}: must hold lines of the form `name: value`")
    given: dict[str, Given] = {}
    for key, value in root.value:
        place = f"{path}, line {key.start_mark.line + 1}"
        name = key.value if isinstance(key, yaml.ScalarNode) else "a list or mapping"
        if name not in kinds:
            raise BadInput(f"{place}: no setting {name}{did_you_mean(name, kinds)}")
        if name in given:
            raise BadInput(f"{place}: {name} stands here twice; the first is {given[name].where}")
        given[name] = Given(_words(value, f"{place}: {name}"), f"{place}: {name}")
    return given


def _words(node: yaml.Node, where: str) -> str | list[str]:
    if isinstance(node, yaml.ScalarNode):
        return "null" if node.style is None and node.value in NULLS else str(node.value)
    if isinstance(node, yaml.SequenceNode) and all(isinstance(item, yaml.ScalarNode) for item in node.value):
        return [item.value for item in node.value]
    raise BadInput(f"{where}: must be one value or a list of values")


def _unlisted(words: list[str], kind: Any) -> str | list[str]:
    """The words of a flag, of which one may be a list of YAML: [a, b]."""
    if len(words) > 1:
        return words
    (word,) = words
    if word.startswith("[") and word.endswith("]"):
        try:
            node = yaml.compose(word, Loader=yaml.SafeLoader)
        except yaml.YAMLError:
            return word
        if isinstance(node, yaml.SequenceNode):
            return _words(node, word)
    is_list = any(get_origin(one) is list for one in (kind, *get_args(kind)))
    return words if is_list and type(None) not in get_args(kind) else word


def _value(kind: Any, given: Given) -> Any:
    try:
        return read_value(kind, given.words)
    except ValueError as error:
        shown = given.words if isinstance(given.words, str) else f"[{', '.join(given.words)}]"
        raise BadInput(f"{given.where} {shown or repr(shown)}: {error}") from None


def _config_file(given: Given, recipes: Sequence[Path]) -> Path:
    path = Path(_value(PathText, given))
    if path.is_file():
        return path
    paths = [os.path.relpath(recipe) for recipe in recipes]
    if path.is_dir():
        own = path / "settings.yaml"
        here = [str(own)] if own.is_file() else [name for name in paths if Path(name).parent.samefile(path)]
        files = here or [str(file) for file in sorted(path.glob("*.y*ml"))[:4]] or paths
        raise BadInput(f"{given.where} {path}: is a folder; did you mean --config {' or '.join(files)}?")
    meant = did_you_mean(path.stem, [recipe.stem for recipe in recipes])
    hints = [name for name in paths if Path(name).stem in re.findall(r"\w+", meant)] or paths
    raise BadInput(f"{given.where} {path}: no such file; did you mean {' or '.join(hints)}?")


# Help


class _HelpFormatter(HelpFormatter, jsonargparse.DefaultHelpFormatter):
    """Without the types, which are Python's; with defaults as YAML has them."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        if default in (None, argparse.SUPPRESS) or "Default:" in text:
            return text
        shown = str(default).lower() if isinstance(default, bool) else default
        return f"{text.rstrip('.')} (default: {', '.join(map(str, shown)) if isinstance(shown, list) else shown})"


def _parser(
    settings_type: type[SettingsSlice], kinds: Mapping[str, Any], description: str | None, common: Sequence[str]
) -> jsonargparse.ArgumentParser:
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    usage = "%(prog)s [--config FILE] [--FLAG VALUE ...]"
    parser = jsonargparse.ArgumentParser(
        description=(description or "").strip(), usage=usage, exit_on_error=False, formatter_class=_HelpFormatter
    )
    first = parser.add_argument_group("The most used")
    first.add_argument("--config", metavar="FILE", help="YAML file of settings; flags override it")
    first.add_argument("--print_config", action="store_true", help="print the settings as YAML, and exit")
    for part in _slices(settings_type):
        parser.add_class_arguments(part, as_group=True)
    actions = {action.dest: action for action in parser._actions}
    for name in common:
        group = next(group for group in parser._action_groups if actions[name] in group._group_actions)
        group._group_actions.remove(actions[name])
        first._group_actions.append(actions[name])
    for name, kind in kinds.items():
        actions[name].option_strings = [f"--{name}"]  # a list's flag has a second name, which we do not take
        if (metavar := _metavar(kind)) is not None:
            actions[name].metavar = metavar
    return parser


def _metavar(kind: Any) -> str | None:
    """What stands for a value of this type; None: its choices."""
    kinds = [kind] if kind is PathText else [one for one in get_args(kind) or (kind,) if one is not type(None)]
    inner = [one for one in kinds for one in (get_args(one) if get_origin(one) is list else (one,))]
    return next((METAVARS[one] for one in inner if one in METAVARS), None)


def _slices(settings_type: type[SettingsSlice]) -> list[type[SettingsSlice]]:
    """The classes that settings_type is the sum of, in the order of its fields."""
    parts = [part for part in reversed(settings_type.__mro__) if inspect.get_annotations(part)]
    return [part for part in parts if issubclass(part, SettingsSlice)]
