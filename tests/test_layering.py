"""The architecture, held by machine: the table of levels in docs/architecture.md, fences, imports without work."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "lit_gpt").rglob("*.py"))
PROGRAMS = sorted(str(path.relative_to(ROOT)) for path in [*ROOT.glob("pretrain/*.py"), *ROOT.glob("scripts/*.py")])
SOURCES = MODULES + PROGRAMS

FENCES = {
    "flash_attn": ("lit_gpt/model/attention.py",),
    "flash_attn_interface": ("lit_gpt/model/attention.py",),
    "xformers": ("lit_gpt/model/attention.py",),
    "lightning": ("lit_gpt/launch/", "lit_gpt/train/", "lit_gpt/bench/bench_litgpt.py"),
    "transformers": ("scripts/",),
    "datatrove": ("scripts/",),
}
OPTIONAL = "datatrove flash_attn flash_attn_interface gguf liger_kernel litgpt lm_eval torchao wandb xformers"


def rooms() -> list[str]:
    """The rooms of lit_gpt in the order of docs/architecture.md: files of the top level, and folders."""
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    return re.findall(r"^\| `(\w+(?:\.py|/))` \|", text, re.MULTILINE)


def room(module: str) -> str:
    """lit_gpt/model/gpt.py -> model/; lit_gpt/cli.py -> cli.py"""
    parts = module.split("/")
    return f"{parts[1]}/" if len(parts) > 2 else parts[1]


def dotted(module: str) -> str:
    return module.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imports(source: str) -> Iterator[str]:
    """Every module that a file imports anywhere, inside functions too; `from a import b` gives a and a.b."""
    for node in ast.walk(ast.parse((ROOT / source).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source}: relative import"
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def library_imports(source: str) -> set[str]:
    """The modules of lit_gpt that a file imports: where it names a package and a name in it, the module alone."""
    known = {dotted(module): module for module in MODULES}
    found = {known[name] for name in imports(source) if name in known}
    return {module for module in found if not module.endswith("__init__.py")}


def test_the_table_names_every_room_once_and_no_other() -> None:
    found = {room(module) for module in MODULES} - {"__init__.py"}
    assert sorted(rooms()) == sorted(found)
    assert len(list((ROOT / "lit_gpt").glob("[!_]*"))) <= 20


@pytest.mark.parametrize("module", [module for module in MODULES if not module.endswith("__init__.py")])
def test_imports_go_to_earlier_rooms(module: str) -> None:
    order = rooms()
    for imported in library_imports(module):
        assert order.index(room(imported)) <= order.index(room(module)), f"{module} imports {imported}: a later room"


def test_no_module_imports_itself_through_others() -> None:
    arrows = {module: library_imports(module) - {module} for module in MODULES}
    try:
        list(TopologicalSorter(arrows).static_order())
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize("source", SOURCES)
def test_programs_are_leaves(source: str) -> None:
    leaves = {Path(program).stem for program in PROGRAMS} | {"pretrain", "scripts"}
    assert not {name.split(".")[0] for name in imports(source)} & leaves


@pytest.mark.parametrize("package", FENCES)
def test_fences(package: str) -> None:
    users = [source for source in SOURCES if package in {name.split(".")[0] for name in imports(source)}]
    assert [user for user in users if not user.startswith(FENCES[package])] == []


@pytest.mark.parametrize("source", SOURCES)
def test_modules_only_define(source: str) -> None:
    """A file's top level holds imports, constants, functions, classes and a program's last line; no `global`."""
    tree = ast.parse((ROOT / source).read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), f"{source} has no docstring"
    defining = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
    guards = ("__name__ == '__main__'", "TYPE_CHECKING")
    for node in tree.body:
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        # A custom operator's backward and shapes are declared by calls; that is definition, not work.
        is_registration = re.match(r"\w+\.register_\w+\(", ast.unparse(node))
        is_guard = isinstance(node, ast.If) and ast.unparse(node.test) in guards
        allowed = isinstance(node, defining) or is_docstring or is_registration or is_guard
        assert allowed, f"{source}:{node.lineno} works at import"
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Global)], f"{source} has a global statement"


def run_python(code: str, *argv: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); {code}", *argv]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def test_import_needs_no_optional_package_and_does_no_work(tmp_path: Path) -> None:
    """None in sys.modules makes Python refuse a package, as if it were not installed."""
    done = run_python(
        f"""sys.modules.update(dict.fromkeys({OPTIONAL!r}.split()))
import importlib, logging, os, threading
import torch, lightning.fabric  # what their own imports set is not ours
environment = dict(os.environ)
for module in {[dotted(module) for module in MODULES]}:
    importlib.import_module(module)
assert os.environ == environment
assert threading.active_count() == 1, threading.enumerate()
assert not torch.cuda.is_initialized()
assert not logging.getLogger().handlers
assert not os.listdir(), os.listdir()""",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout + done.stderr == ""


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_needs_no_torch(program: str, tmp_path: Path) -> None:
    """`--help` is instant: torch, lightning, transformers and matplotlib, refused here, are not asked for."""
    done = run_python(
        f"""sys.modules.update(dict.fromkeys(["torch", "lightning", "transformers", "matplotlib"]))
import runpy
sys.argv = [{program!r}, "--help"]
runpy.run_path({str(ROOT / program)!r}, run_name="__main__")""",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: ")


@pytest.mark.parametrize("module", sorted({"cli", "config", *(room(m)[:-1] for m in MODULES if room(m)[-1] == "/")}))
def test_entering_a_room_needs_no_torch(module: str, tmp_path: Path) -> None:
    done = run_python(f"sys.modules['torch'] = None; import lit_gpt.{module}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("source", SOURCES)
def test_sizes(source: str) -> None:
    """A file holds at most 350 lines, a function at most 80."""
    text = (ROOT / source).read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 350
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 80, node.name
