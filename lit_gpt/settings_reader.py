"""A run's settings: defaults < the environment < YAML files (`--config`) < flags.

The fields of the settings' dataclasses are the flags and the keys; the docstring after a field is its help. A value is
read in the same way wherever it stands (values.py), and a mistake is told with the place where it stands.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import logging
import os
import re
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

import yaml

from lit_gpt.cli import BadInput, Parser, SettingsSlice
from lit_gpt.values import PathText, did_you_mean, read_value

Slice = TypeVar("Slice", bound=SettingsSlice)
log = logging.getLogger(__name__)

NULLS = ("", "~", "null", "Null", "NULL")
METAVARS = {int: "N", float: "X", str: "TEXT", PathText: "PATH", bool: "true|false"}


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
    parser = _parser(settings_type, kinds, description, common)
    arguments, extra = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
    if extra:
        file = extra[0].endswith((".yaml", ".yml"))
        hint = f"; did you mean --config {extra[0]}?" if file else " (--help lists the flags)"
        raise BadInput(f"{extra[0]}: the value of no flag{hint}")
    flags = vars(arguments)
    shown = flags.pop("print_config", False)
    given = dict(environment or {})
    from_environment = given.pop("config", None)
    named = [Given(file, "--config") for file in flags.pop("config", [])]
    files = [_config_file(file, recipes) for file in named or ([from_environment] if from_environment else [])]
    for file in files:
        given |= read_yaml(file, kinds)
    taken = [from_environment] if from_environment and not named else []
    given |= {name: Given(_unlisted(words), f"--{name}") for name, words in flags.items()}
    settings = settings_type(**{name: _value(kinds[name], entry) for name, entry in given.items()})
    taken += [entry for name, entry in given.items() if entry is (environment or {}).get(name)]
    if taken:
        log.info("from the environment: %s", ", ".join(f"{entry.where} {entry.words}" for entry in taken))
    if shown:
        print(yaml.safe_dump(dataclasses.asdict(settings), sort_keys=False, allow_unicode=True), end="")  # noqa: T201
        sys.exit()
    return settings, files


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


def _unlisted(words: str | list[str]) -> str | list[str]:
    """The words of a flag, of which one may be a list of YAML: [a, b]."""
    if isinstance(words, str) or len(words) > 1:
        return words
    (word,) = words
    if word.startswith("[") and word.endswith("]"):
        try:
            node = yaml.compose(word, Loader=yaml.SafeLoader)
        except yaml.YAMLError:
            return word
        if isinstance(node, yaml.SequenceNode):
            return _words(node, word)
    return word


def _value(kind: Any, given: Given) -> Any:
    try:
        return read_value(kind, given.words)
    except ValueError as error:
        shown = given.words if isinstance(given.words, str) else f"[{', '.join(given.words)}]"
        raise BadInput(f"{given.where} {shown or repr(shown)}: {error}") from None


def _config_file(given: Given, recipes: Sequence[Path]) -> Path:
    path = Path(_value(PathText, given))
    if path.is_dir() and (path / "settings.yaml").is_file():
        raise BadInput(f"{given.where} {path}: is a folder; did you mean --config {path / 'settings.yaml'}?")
    if path.is_file():
        return path
    paths = [os.path.relpath(recipe) for recipe in recipes]
    meant = did_you_mean(path.stem, [recipe.stem for recipe in recipes])
    hints = [name for name in paths if Path(name).stem in re.findall(r"\w+", meant)] or paths
    raise BadInput(f"{given.where} {path}: no such file; did you mean {' or '.join(hints)}?")


# Help


def _parser(
    settings_type: type[SettingsSlice], kinds: Mapping[str, Any], description: str | None, common: Sequence[str]
) -> Parser:
    usage = "%(prog)s [--config FILE] [--FLAG VALUE ...]"
    parser = Parser(description, usage=usage, argument_default=argparse.SUPPRESS)
    groups = {name: parser.add_argument_group("The most used") for name in common[:1]}
    groups |= dict.fromkeys(common, *groups.values())
    first = next(iter(groups.values()), parser)
    first.add_argument("--config", action="append", metavar="FILE", help="YAML file of settings; flags override it")
    first.add_argument("--print_config", action="store_true", help="print the settings as YAML, and exit")
    parts: dict[str, tuple[Any, str]] = {}
    for part in _slices(settings_type):
        group, texts = parser.add_argument_group((part.__doc__ or part.__name__).strip().rstrip(".")), _docstrings(part)
        parts |= {name: (groups.get(name, group), texts.get(name, "")) for name in inspect.get_annotations(part)}
    defaults = {field.name: field for field in dataclasses.fields(settings_type)}
    for name in (*common, *(name for name in parts if name not in common)):
        group, text = parts[name]
        group.add_argument(f"--{name}", **_form(kinds[name]), help=_help(text, defaults[name]).replace("%", "%%"))
    return parser


def _form(kind: Any) -> dict[str, Any]:
    """How argparse takes a flag of this type: as text, which _value reads."""
    kinds = [one for one in get_args(kind) or (kind,) if one is not type(None)]
    if get_origin(kind) in (list, Literal) or kind is PathText:
        kinds = [kind]
    if any(get_origin(one) is list for one in kinds):
        (inner,) = get_args(next(one for one in kinds if get_origin(one) is list))
        return dict(nargs="+", action="extend", metavar=METAVARS[inner])
    (one,) = kinds
    if one is bool:
        return dict(nargs="?", const="true", metavar=METAVARS[bool])
    return dict(metavar=f"{{{','.join(get_args(one))}}}" if get_origin(one) is Literal else METAVARS[one])


def _help(text: str, field: dataclasses.Field[Any]) -> str:
    default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
    if default is None or "Default:" in text:
        return text
    shown = str(default).lower() if isinstance(default, bool) else default
    return f"{text.rstrip('.')} (default: {', '.join(shown) if isinstance(shown, list) else shown})"


def _slices(settings_type: type[SettingsSlice]) -> list[type[SettingsSlice]]:
    """The classes that settings_type is the sum of, in the order of its fields."""
    parts = [part for part in reversed(settings_type.__mro__) if inspect.get_annotations(part)]
    return [part for part in parts if issubclass(part, SettingsSlice)]


def _docstrings(part: type[SettingsSlice]) -> dict[str, str]:
    """Name of each field that the class itself defines -> the docstring that follows it."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(part))).body
    assert isinstance(definition, ast.ClassDef)
    found = {}
    for field, after in zip(definition.body, definition.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(after, ast.Expr):
            found[field.target.id] = " ".join(str(ast.literal_eval(after.value)).split())
    return found
