"""The architecture, as docs/architecture.md states it: order of the rooms, fences, imports without side effects.

`python -m tests.test_layering` counts files, rooms and the arrows between them.
"""

from __future__ import annotations

import ast
import os
import re
import site
import subprocess
import sys
from fnmatch import fnmatchcase
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "lit_gpt").rglob("*.py"))
PROGRAMS = sorted(str(path.relative_to(ROOT)) for path in [*ROOT.glob("pretrain/*.py"), *ROOT.glob("scripts/*.py")])
SOURCES = MODULES + PROGRAMS

FENCES = {
    "cut_cross_entropy": ("lit_gpt/bench/*",),
    "datatrove": ("lit_gpt/corpus/*",),
    "flash_attn": ("lit_gpt/model/attention.py",),
    "flash_attn_interface": ("lit_gpt/model/attention.py",),
    "gguf": ("lit_gpt/export/gguf_export.py",),
    "lightning": ("lit_gpt/launch/*", "lit_gpt/bench/bench_litgpt.py"),
    "liger_kernel": ("lit_gpt/bench/*",),
    "litgpt": ("lit_gpt/bench/*", "scripts/benchmark_litgpt.py"),  # the script looks whether it is there
    "lm_eval": ("lit_gpt/eval/*", "lit_gpt/tasks/*"),
    # report/ is to draw all pictures; until that room is there, these do
    "matplotlib": ("lit_gpt/datapoints/compare_runs.py", "lit_gpt/export/model_card.py", "scripts/*"),
    "pynvml": ("lit_gpt/launch/*",),
    "quack": ("lit_gpt/model/*", "lit_gpt/train/muon.py"),
    "torchao": ("lit_gpt/model/float8.py",),
    "trackio": ("lit_gpt/train/*_run.py",),
    "transformers": ("scripts/*",),
    "triton": ("lit_gpt/*_triton.py",),
    "wandb": ("lit_gpt/train/*_run.py",),
    "xformers": ("lit_gpt/model/attention.py",),
}
"""Package -> patterns of the files that may import it; `*` crosses folders."""
REQUIRED = {"lightning", "matplotlib", "transformers"}
"""Of the fenced ones those in requirements.txt; the others may be missing."""
LOADERS = {"import_module", "__import__", "find_spec", "run_module", "resolve_name"}
"""What loads, or looks for, a module that a string names."""
SHIM = "sys.path.insert(0, str(Path(__file__).resolve().parents[1]))"
"""A program's way to the lit_gpt of its own checkout."""


@cache
def rooms() -> list[str]:
    """The rooms of lit_gpt in the order of docs/architecture.md: folders, as model/, and files, as cli.py."""
    return re.findall(r"^\| `(\w+(?:\.py|/))` \|", read("docs/architecture.md"), re.MULTILINE)


def room(module: str) -> str:
    """lit_gpt/model/gpt.py -> model/; lit_gpt/cli.py -> cli.py"""
    parts = module.split("/")
    return f"{parts[1]}/" if len(parts) > 2 else parts[1]


def dotted(module: str) -> str:
    return module.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def read(source: str) -> str:
    return (ROOT / source).read_text(encoding="utf-8")


@cache
def imports(text: str) -> frozenset[str]:
    """Dotted names of all that a file imports, inside functions too; `from a import b` is a.b, a relative import .b.

    A file that loads modules by name counts as importing each module of ours and each fenced package that one of its
    strings names, wherever it stands; docstrings do not count.
    """
    nodes = list(ast.walk(ast.parse(text)))
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parent = "." * node.level + (f"{node.module}." if node.module else "")
            found |= {f"{parent}{alias.name}" for alias in node.names}
    words = {getattr(node, "id", getattr(node, "attr", getattr(node, "name", None))) for node in nodes}
    if words & LOADERS:
        docstrings = {node.value for node in nodes if isinstance(node, ast.Expr)}
        constants = [node for node in nodes if isinstance(node, ast.Constant) and node not in docstrings]
        strings = [node.value for node in constants if isinstance(node.value, str)]
        # The last dot may be open: a piece of a name that is put together.
        names = {name for name in strings if re.fullmatch(r"[A-Za-z_]\w*(\.\w+)*\.?", name)}
        found |= {name for name in names if name.split(".")[0] in {"lit_gpt", "pretrain", "scripts", *FENCES}}
    return frozenset(found)


def breaches(source: str, text: str) -> list[str]:
    """The imports of a file that the architecture forbids, each with the reason."""
    order = rooms()
    leaves = {Path(program).stem for program in PROGRAMS} | {"pretrain", "scripts"}
    found = []
    for name in sorted(imports(text)):
        root, *inner = name.split(".")
        if not root:
            found.append(f"{name}: a relative import")
        elif root in leaves:
            found.append(f"{name}: a program")
        elif root in FENCES and not any(fnmatchcase(source, pattern) for pattern in FENCES[root]):
            found.append(f"{name}: only in {', '.join(FENCES[root])}")
        elif root == "lit_gpt" and source in MODULES:
            earlier = order[: order.index(room(source)) + 1] if room(source) in order else []
            if not inner or inner[0] not in {Path(entry).stem for entry in earlier}:
                found.append(f"{name}: not in {room(source)} or an earlier room")
    return found


def arrows(texts: dict[str, str]) -> dict[str, set[str]]:
    """File of lit_gpt -> files of lit_gpt that it imports."""
    known = {dotted(module): module for module in MODULES}

    def file_of(name: str) -> str:
        while name and name not in known:
            name = name.rpartition(".")[0]
        return known.get(name, "")

    return {module: {file_of(name) for name in imports(text)} - {"", module} for module, text in texts.items()}


def circle(texts: dict[str, str]) -> list[str]:
    """Files that import each other in a circle; empty if there are none."""
    try:
        list(TopologicalSorter(arrows(texts)).static_order())
    except CycleError as error:
        return list(error.args[1])
    return []


def modules() -> dict[str, str]:
    return {module: read(module) for module in MODULES}


def test_the_table_names_every_room_once_and_no_other() -> None:
    assert sorted(rooms()) == sorted({room(module) for module in MODULES} - {"__init__.py"})
    assert len(list((ROOT / "lit_gpt").glob("[!_]*"))) <= 20


@pytest.mark.parametrize("source", SOURCES)
def test_imports_stay_inside_the_walls(source: str) -> None:
    assert breaches(source, read(source)) == []


def test_no_module_imports_itself_through_others() -> None:
    assert circle(modules()) == []


FORMS = {
    "import": "import {name}",
    "import as": "import {name} as x",
    "from": "from {name} import x",
    "from its parent": "from {parent} import {child}",
    "inside a function": "def f():\n    import {name}",
    "for types": "if TYPE_CHECKING:\n    from {name} import x",
    "importlib": "import importlib\nx = importlib.import_module('{name}')",
    "import_module": "from importlib import import_module\ndef f():\n    return import_module('{name}')",
    "import_module as": "from importlib import import_module as load\nx = load(name='{name}')",
    "a table": "PACKAGES = {{'x': ('{name}', 'how')}}\ndef f(x):\n    return importlib.import_module(PACKAGES[x][0])",
    "a constant": "NAME = '{name}'\ndef f():\n    return importlib.import_module(NAME)",
    "a default": "def f(name='{name}'):\n    return importlib.import_module(name)",
    "pieces": "def f(x):\n    return importlib.import_module(f'{parent}.{{x}}')",
    "__import__": "x = __import__('{name}')",
    "find_spec": "x = importlib.util.find_spec('{name}')",
}
"""Ways to import a module."""
FORBIDDEN = [
    *((f"{package}.inner", "lit_gpt/config.py") for package in FENCES),
    ("flash_attn.cute", "lit_gpt/launch/node_check.py"),
    ("quack.gemm", "lit_gpt/train/optimizer.py"),
    ("torchao.float8", "lit_gpt/model/fused_mlp.py"),
    ("lightning.fabric", "lit_gpt/model/gpt.py"),
    ("transformers.utils", "lit_gpt/export/parity.py"),
    ("wandb.sdk", "lit_gpt/train/trainer.py"),
    ("triton.language", "lit_gpt/model/gpt.py"),
    ("lm_eval.tasks", "scripts/evaluate.py"),
    ("lit_gpt.train.trainer", "lit_gpt/data/order.py"),
    ("lit_gpt.bench.bench_step", "lit_gpt/cli.py"),
    ("lit_gpt.no_room.file", "lit_gpt/train/trainer.py"),
    ("scripts.demo", "lit_gpt/train/trainer.py"),
    ("pretrain.tinyllama_fabric", "scripts/demo.py"),
]
"""A module, and a file that must not import it."""


@pytest.mark.parametrize("form", FORMS)
def test_a_planted_import_is_seen(form: str) -> None:
    for name, source in FORBIDDEN:
        parent, _, child = name.rpartition(".")
        found = breaches(source, f"{read(source)}\n{FORMS[form].format(name=name, parent=parent, child=child)}\n")
        assert len(found) == 1, (name, source, found)
        assert found[0].startswith(f"{parent}."), found


def test_what_is_no_import_is_not_seen() -> None:
    loads = 'import importlib\nx = importlib.import_module("json")\n'
    assert breaches("lit_gpt/cli.py", f'"""wandb"""\n{loads}y = "wandb is off"\n') == []
    assert breaches("lit_gpt/cli.py", 'x = "wandb"\n') == [], "no module is loaded by name here"
    assert breaches("lit_gpt/cli.py", f'{loads}y = "wandb"\n') == ["wandb: only in lit_gpt/train/*_run.py"]


def test_a_relative_import_is_seen() -> None:
    assert breaches("lit_gpt/model/gpt.py", "from . import loss") == [".loss: a relative import"]
    assert breaches("lit_gpt/model/gpt.py", "from ..train.trainer import x") == ["..train.trainer.x: a relative import"]


@pytest.mark.parametrize("form", [form for form in FORMS if form != "pieces"])  # the rest of such a name is not known
def test_a_planted_circle_is_seen(form: str) -> None:
    """Inside the room data/, where row_reader imports order: order imports row_reader, or a file that does."""
    for child in ("row_reader", "loader"):
        planted = FORMS[form].format(name=f"lit_gpt.data.{child}", parent="lit_gpt.data", child=child)
        texts = modules()
        texts["lit_gpt/data/order.py"] += f"\n{planted}\n"
        found = circle(texts)
        assert found[0] == found[-1]
        assert {"lit_gpt/data/order.py", f"lit_gpt/data/{child}.py"} <= set(found)


@pytest.mark.parametrize("source", SOURCES)
def test_modules_only_define(source: str) -> None:
    """A file's top level holds imports, constants, functions, classes, a program's shim and last line; no `global`."""
    tree = ast.parse(read(source))
    assert ast.get_docstring(tree), f"{source} has no docstring"
    defining = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
    guards = ("__name__ == '__main__'", "TYPE_CHECKING")
    for node in tree.body:
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        # A custom operator's backward and shapes are declared by calls; that is definition, not work.
        is_registration = re.match(r"\w+\.register_\w+\(", ast.unparse(node))
        is_guard = isinstance(node, ast.If) and ast.unparse(node.test) in guards
        is_shim = source in PROGRAMS and ast.unparse(node) == SHIM
        allowed = isinstance(node, defining) or is_docstring or is_registration or is_guard or is_shim
        assert allowed, f"{source}:{node.lineno} works at import"
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Global)], f"{source} has a global statement"


def run_python(code: str, *argv: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); {code}", *argv]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_import_needs_no_optional_package_and_does_no_work(tmp_path: Path) -> None:
    """None in sys.modules makes Python refuse a package, as if it were not installed.

    A *_triton.py holds kernels and imports triton: other modules, imported here, may import it in functions only.
    """
    done = run_python(
        f"""sys.modules.update(dict.fromkeys({sorted(FENCES.keys() - REQUIRED)}))
import importlib, logging, os, threading
import torch, lightning.fabric  # what their own imports set is not ours
environment = dict(os.environ)
for module in {[dotted(module) for module in MODULES if not module.endswith("_triton.py")]}:
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


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packages that end the program which imports them: another lit_gpt, and what takes seconds to import."""
    folder = tmp_path_factory.mktemp("poisoned")
    for package in ("lit_gpt", "torch", "lightning", "transformers", "matplotlib"):
        (folder / f"{package}.py").write_text("raise SystemExit(f'{__file__} was imported')")
    return folder


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_needs_no_installation_and_no_torch(program: str, poisoned: Path, tmp_path: Path) -> None:
    """`--help` is instant, and a checkout's program takes the checkout's lit_gpt, though another comes first.

    -S leaves out the installed packages; they follow as a path, which leaves out those installed as a link, as ours is.
    """
    path = os.pathsep.join([str(poisoned), *site.getsitepackages()])
    done = subprocess.run(
        [sys.executable, "-S", ROOT / program, "--help"], env={**os.environ, "PYTHONPATH": path},
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: ")


@pytest.mark.parametrize("module", [Path(entry).stem for entry in rooms()])
def test_entering_a_room_needs_no_torch(module: str, tmp_path: Path) -> None:
    done = run_python(f"sys.modules['torch'] = None; import lit_gpt.{module}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("source", SOURCES)
def test_sizes(source: str) -> None:
    """A file holds at most 350 lines, a function at most 80."""
    text = read(source)
    assert len(text.splitlines()) <= 350
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 80, node.name


if __name__ == "__main__":
    found = arrows(modules())
    between = {(room(module), room(other)) for module in found for other in found[module]}
    print(f"{len(found)} files, {sum(map(len, found.values()))} imports of each other")
    print(f"{len(rooms())} rooms, {sum(here != there for here, there in between)} arrows between them")
