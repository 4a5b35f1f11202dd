"""Pages that mkdocs makes from the code: every setting with its default and meaning, every program with its --help."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import subprocess
import sys
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

from lit_gpt.cli import SettingsSlice  # noqa: E402
from lit_gpt.train.settings import Settings  # noqa: E402

PROGRAMS = sorted([*ROOT.glob("pretrain/*.py"), *ROOT.glob("scripts/*.py")])
SHELL = ("scripts/create.sh", "cluster/exec/train_fabric.sh", "cluster/building/build-image.sh")
"""Programs that say what they do in the comment at their top."""


def on_files(files: Any, config: Any) -> Any:
    """Called by mkdocs when it has found the files of docs/."""
    from mkdocs.structure.files import File

    for name, content in (("settings", settings_page()), ("programs", programs_page())):
        files.append(File.generated(config, f"reference/{name}.md", content=content))
    return files


def settings_page() -> str:
    """Every setting, below the slice that it belongs to."""
    lines = [
        "# Settings", "",
        "Each is a flag of `pretrain/tinyllama_fabric.py` (`--learning_rate 1e-4`) and a key of its YAML files. Flags",
        "override the files (`--config`), these the site's variables, and these the defaults.", "",
    ]  # fmt: skip
    for slice_ in slices():
        lines += [f"## {(inspect.getdoc(slice_) or slice_.__name__).splitlines()[0].rstrip('.')}", ""]
        lines += ["| setting | default | meaning |", "|---|---|---|"]
        for name, type_, meaning in fields_of(slice_):
            default = next(field for field in dataclasses.fields(slice_) if field.name == name)
            lines.append(f"| `{name}` | `{shown(default)}` | {cell(meaning)} `{cell(type_)}` |")
        lines.append("")
    return "\n".join(lines)


def slices() -> Iterator[type[SettingsSlice]]:
    """The classes that hold fields of their own, in the order of inheritance, the most special last."""
    for class_ in reversed(Settings.__mro__):
        if issubclass(class_, SettingsSlice) and inspect.get_annotations(class_):
            yield class_


def fields_of(slice_: type[SettingsSlice]) -> Iterator[tuple[str, str, str]]:
    """(name, type, docstring) of the fields that a slice adds, from its source."""
    (definition,) = ast.parse(inspect.getsource(slice_)).body
    assert isinstance(definition, ast.ClassDef)
    for statement, after in zip(definition.body, [*definition.body[1:], None], strict=True):
        if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
            continue
        is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
        meaning = " ".join(str(after.value.value).split()) if is_text else ""  # type: ignore[union-attr]
        yield statement.target.id, ast.unparse(statement.annotation), meaning


def shown(field: Any) -> str:
    value = field.default if field.default is not dataclasses.MISSING else field.default_factory()
    return cell("unset" if value is None else str(value).lower() if isinstance(value, bool) else str(value))


def cell(text: str) -> str:
    """A text inside a table of Markdown."""
    return text.replace("|", "\\|").replace("\n", " ")


def programs_page() -> str:
    """Every program with what --help prints, the training's without its settings; scripts with their first comment."""
    lines = ["# Programs", ""]
    for program in PROGRAMS:
        helped = subprocess.run(
            [sys.executable, program, "--help"], capture_output=True, text=True, check=True,
            env={"COLUMNS": "100", "PATH": "/usr/bin:/bin"}, cwd=ROOT,
        ).stdout  # fmt: skip
        if program.parent.name == "pretrain":
            helped = f"{program_docstring(program)}\n\nIts settings have a page of their own."
        lines += [f"## {program.relative_to(ROOT)}", "", "```text", helped.strip(), "```", ""]
    for name in SHELL:
        comment = takewhile(is_comment, (ROOT / name).read_text(encoding="utf-8").splitlines()[1:])
        lines += [f"## {name}", "", "```text", *(line[1:].removeprefix(" ") for line in comment), "```", ""]
    return "\n".join(lines)


def is_comment(line: str) -> bool:
    """Not of a directive such as #SBATCH."""
    return line == "#" or line.startswith("# ")


def program_docstring(program: Path) -> str:
    return ast.get_docstring(ast.parse(program.read_text(encoding="utf-8"))) or ""
