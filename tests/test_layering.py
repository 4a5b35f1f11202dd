"""The architecture, held by machine: the table of levels in docs/architecture.md, fences, imports without work."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted(path.stem for path in (ROOT / "lit_gpt").glob("*.py") if path.stem != "__init__")
PROGRAMS = sorted(str(path.relative_to(ROOT)) for path in [*ROOT.glob("pretrain/*.py"), *ROOT.glob("scripts/*.py")])
SOURCES = [f"lit_gpt/{module}.py" for module in MODULES] + PROGRAMS

FENCES = {
    "flash_attn": ("lit_gpt/attention.py",),
    "flash_attn_interface": ("lit_gpt/attention.py",),
    "xformers": ("lit_gpt/attention.py",),
    "lightning": ("lit_gpt/strategy.py", "lit_gpt/train_step.py", "lit_gpt/litgpt_benchmark.py"),
    "transformers": ("scripts/",),
    "datatrove": ("scripts/",),
}
OPTIONAL = "datatrove flash_attn flash_attn_interface gguf liger_kernel litgpt lm_eval torchao wandb xformers"


def level_table() -> dict[str, int]:
    """Module -> level, in the table's order."""
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d) \| (\w+)\.py \|", text, re.MULTILINE)
    return {module: int(level) for level, module in rows}


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
    return {name.split(".")[1] for name in imports(source) if name.startswith("lit_gpt.")} & set(MODULES)


def test_table_names_every_module_once_and_no_other() -> None:
    assert sorted(level_table()) == MODULES


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_downwards(module: str) -> None:
    levels = level_table()
    order = list(levels)
    for imported in library_imports(f"lit_gpt/{module}.py"):
        below = levels[imported] <= levels[module] and order.index(imported) < order.index(module)
        assert below, f"{module}.py (level {levels[module]}) imports {imported}.py (level {levels[imported]})"


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
for module in {MODULES}:
    importlib.import_module(f"lit_gpt.{{module}}")
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


@pytest.mark.parametrize("module", ["cli", "config", "args"])
def test_level_zero_needs_no_torch(module: str, tmp_path: Path) -> None:
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
