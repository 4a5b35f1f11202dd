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
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "lit_gpt").rglob("*.py"))
PROGRAMS = sorted(str(path.relative_to(ROOT)) for path in [*ROOT.glob("pretrain/*.py"), *ROOT.glob("scripts/*.py")])
SOURCES = MODULES + PROGRAMS

# pictures for a model card and for flags that ask for one; pages are drawn by report/
DRAWING = (
    "lit_gpt/datapoints/compare_runs.py", "lit_gpt/export/model_card.py", "scripts/prepare_data.py",
)  # fmt: skip
FENCES = {
    "cut_cross_entropy": ("lit_gpt/bench/*",),
    "datatrove": ("lit_gpt/corpus/*", "lit_gpt/bench/bench_corpus.py"),
    "flash_attn": ("lit_gpt/model/attention.py",),
    "flash_attn_2_cuda": ("lit_gpt/model/attention.py",),
    "flash_attn_3": ("lit_gpt/model/attention.py",),
    "flash_attn_interface": ("lit_gpt/model/attention.py",),
    "gguf": ("lit_gpt/export/gguf_export.py",),
    "lightning": ("lit_gpt/launch/*", "lit_gpt/bench/bench_litgpt.py"),
    "lightning_fabric": ("lit_gpt/launch/*", "lit_gpt/bench/bench_litgpt.py"),
    "liger_kernel": ("lit_gpt/bench/*",),
    "litgpt": ("lit_gpt/bench/*", "scripts/benchmark_litgpt.py"),  # the script looks whether it is there
    "lm_eval": ("lit_gpt/eval/*", "lit_gpt/tasks/*"),
    "matplotlib": DRAWING,
    "mpl_toolkits": DRAWING,
    "pylab": DRAWING,
    "pynvml": ("lit_gpt/launch/*",),
    "pytorch_lightning": ("lit_gpt/launch/*", "lit_gpt/bench/bench_litgpt.py"),
    "quack": ("lit_gpt/model/*",),
    "torchao": ("lit_gpt/model/float8.py",),
    "trackio": ("lit_gpt/train/*_run.py",),
    "transformers": ("scripts/*",),
    "triton": ("lit_gpt/*_triton.py",),
    "wandb": ("lit_gpt/train/*_run.py",),
    "xllamacpp": ("lit_gpt/export/llama_cpp.py",),
    "xformers": ("lit_gpt/model/attention.py",),
}
"""Package, or another module that it installs -> patterns of the files that may import it; `*` crosses folders."""
REQUIRED = {"datatrove", "lightning", "matplotlib", "mpl_toolkits", "pylab", "transformers"}
"""Of the fenced ones those that requirements.txt installs; the others may be missing."""
LOADERS = {
    "__import__", "import_module", "find_spec", "get_loader", "resolve_name", "run_module", "run_path",
    "spec_from_file_location", "SourceFileLoader", "modules",
}  # fmt: skip
"""What loads, or looks for, a module that a string names; `modules` is sys.modules, no method of that name."""
ABOVE = {"pretrain", "scripts", "setup", "tests"}
"""What no file of the library and no program imports; beside these each program by its own name."""
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


def named(string: str, source: str) -> str:
    """The module of ours or fenced package that a string of the source names, else "".

    Forms: a.b; a:b; ..b, from the source's package; x/a/b.py, in any folder; a. and a/, pieces of a name.
    """
    roots = {"lit_gpt", *ABOVE, *FENCES}
    if re.fullmatch(r".*\.py|[\w./-]+/[\w./-]*", string):
        parts = PurePosixPath(string.removesuffix(".py")).parts
        known = roots | {Path(program).stem for program in PROGRAMS if string.endswith(".py")}
        return ".".join(parts[next((at for at, part in enumerate(parts) if part in known), len(parts)) :])
    form = re.fullmatch(r"(\.*)([A-Za-z_]\w*(\.\w+)*\.?)", string.replace(":", "."))
    if not form:
        return ""
    package = source.split("/")[: -len(form[1])] if form[1] else []
    name = ".".join([*package, form[2]])
    return name if name.split(".")[0] in roots else ""


@cache
def imports(text: str, source: str = "") -> frozenset[str]:
    """Dotted names of all that a file imports, inside functions too; `from a import b` is a.b, a relative import .b.

    lit_gpt.a.b in an expression counts as an import of it: `import lit_gpt.c` makes it reachable. A file that loads
    modules by name counts as importing each module of ours and each fenced package that one of its strings names,
    wherever it stands; docstrings do not count. Only a relative name in a string needs the source.
    """
    nodes = list(ast.walk(ast.parse(text)))
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parent = "." * node.level + (f"{node.module}." if node.module else "")
            found |= {f"{parent}{alias.name}" for alias in node.names}
    inner = {node.value for node in nodes if isinstance(node, ast.Attribute)}
    chains = {ast.unparse(node) for node in nodes if isinstance(node, (ast.Name, ast.Attribute)) and node not in inner}
    found |= {chain for chain in chains if re.fullmatch(r"lit_gpt(\.\w+)*", chain)}

    docstrings = {node.value for node in nodes if isinstance(node, ast.Expr)}
    constants = [node for node in nodes if isinstance(node, ast.Constant) and node not in docstrings]
    strings = {node.value for node in constants if isinstance(node.value, str)}
    called = {node.func for node in nodes if isinstance(node, ast.Call)}
    mentions = [node for node in nodes if not (node in called and getattr(node, "attr", "") == "modules")]
    words = {getattr(node, "id", getattr(node, "attr", getattr(node, "name", None))) for node in mentions}
    if (words | strings) & LOADERS:
        found |= {named(string, source) for string in strings} - {""}
    return frozenset(found)


def breaches(source: str, text: str) -> list[str]:
    """The imports of a file that the architecture forbids, each with the reason."""
    order = rooms()
    above = {Path(program).stem for program in PROGRAMS} | ABOVE
    found = []
    for name in sorted(imports(text, source)):
        root, *inner = name.split(".")
        if not root:
            found.append(f"{name}: a relative import")
        elif root in above:
            found.append(f"{name}: programs, tests and setup.py are not for import")
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

    return {module: {file_of(name) for name in imports(text, module)} - {"", module} for module, text in texts.items()}


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


def test_the_table_of_fences_is_the_list() -> None:
    """A pattern without a file is of a room to come, and the table does not name it."""
    fences = re.search(r"^## Fences$(.*?)^## ", read("docs/architecture.md"), re.MULTILINE | re.DOTALL)
    assert fences
    stated = {}
    for packages, places in re.findall(r"^\| (`.+?) \| (.+?) \|$", fences[1], re.MULTILINE):
        for package in re.findall(r"`(\w+)`", packages):
            assert package not in stated
            stated[package] = re.findall(r"`(.+?)`", places)
    patterns = {pattern for places in FENCES.values() for pattern in places}
    alive = {pattern for pattern in patterns if any(fnmatchcase(source, pattern) for source in SOURCES)}
    assert stated == {package: [place for place in places if place in alive] for package, places in FENCES.items()}


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
    "resolve_name": "x = pkgutil.resolve_name('{parent}:{child}')",
    "run_module": "x = runpy.run_module('{name}')",
    "get_loader": "x = pkgutil.get_loader('{name}')",
    "getattr": "x = getattr(importlib, 'import_module')('{name}')",
    "sys.modules": "x = sys.modules['{name}']",
    "modules": "from sys import modules as loaded\nx = loaded.get('{name}')",
    "run_path": "x = runpy.run_path('{path}.py')",
    "a path below a folder": "x = runpy.run_path(f'{{ROOT}}/{path}.py')",
    "pieces of a path": "x = runpy.run_path(f'{parent_path}/{{x}}.py')",
    "spec_from_file_location": "x = importlib.util.spec_from_file_location('x', './{path}.py')",
    "SourceFileLoader": "x = importlib.machinery.SourceFileLoader('x', '/repository/{path}.py').load_module()",
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
    ("tests.test_files", "lit_gpt/files.py"),
    ("tests.support.kept", "scripts/demo.py"),
    ("setup.version", "lit_gpt/cli.py"),
]
"""A module, and a file that must not import it."""


def planted(form: str, name: str) -> str:
    """The text of a file that imports a module in one of the forms."""
    parent, _, child = name.rpartition(".")
    paths = {"path": name.replace(".", "/"), "parent_path": parent.replace(".", "/")}
    line = FORMS[form].format(name=name, parent=parent, child=child, **paths)
    return f'"""A file of the library."""\n\nimport json\n\nx = json.dumps("a string")\n{line}\n'


@pytest.mark.parametrize("form", FORMS)
def test_a_planted_import_is_seen(form: str) -> None:
    for name, source in FORBIDDEN:
        found = breaches(source, planted(form, name))
        assert len(found) == 1, (name, source, found)
        assert re.match(rf"{re.escape(name.rpartition('.')[0])}[.:]", found[0]), found


def test_what_is_no_import_is_not_seen() -> None:
    loads = 'import importlib\nx = importlib.import_module("json")\n'
    assert breaches("lit_gpt/cli.py", f'"""wandb"""\n{loads}y = "wandb is off"\n') == []
    assert breaches("lit_gpt/cli.py", 'x = "wandb"\n') == [], "no module is loaded by name here"
    assert breaches("lit_gpt/cli.py", f'{loads}y = "wandb"\n') == ["wandb: only in lit_gpt/train/*_run.py"]
    assert breaches("lit_gpt/model/gpt.py", 'x = [*gpt.modules()]\ny = "wandb"\n') == [], "not sys.modules"


def test_a_relative_import_is_seen() -> None:
    assert breaches("lit_gpt/model/gpt.py", "from . import loss") == [".loss: a relative import"]
    assert breaches("lit_gpt/model/gpt.py", "from ..train.trainer import x") == ["..train.trainer.x: a relative import"]
    by_name = "x = importlib.import_module('{}', __package__)"
    later = ["lit_gpt.train.trainer: not in model/ or an earlier room"]
    assert breaches("lit_gpt/model/gpt.py", by_name.format("..train.trainer")) == later
    assert breaches("lit_gpt/model/gpt.py", by_name.format(".loss")) == []
    assert len(breaches("scripts/demo.py", by_name.format(".generate"))) == 1


def test_a_name_that_begins_with_lit_gpt_is_seen() -> None:
    """`import lit_gpt.data` binds lit_gpt, and with it each room that anything has imported."""
    later = ["lit_gpt.train.trainer.x: not in data/ or an earlier room"]
    assert breaches("lit_gpt/data/order.py", "import lit_gpt.data\ny = lit_gpt.train.trainer.x()\n") == later
    assert breaches("lit_gpt/data/order.py", "import lit_gpt.data\ny = lit_gpt.data.packing.x()\n") == []
    for hidden in ("getattr(lit_gpt, 'train')", "sys.modules['lit_gpt']"):
        found = breaches("lit_gpt/data/order.py", f"import lit_gpt.data\ny = {hidden}\n")
        assert found == ["lit_gpt: not in data/ or an earlier room"]


def test_a_program_by_the_name_of_its_file_is_seen() -> None:
    assert len(breaches("lit_gpt/cli.py", "x = runpy.run_path('demo.py')")) == 1
    assert len(breaches("scripts/demo.py", "import generate")) == 1
    assert len(breaches("scripts/demo.py", "import setup")) == 1


@pytest.mark.parametrize("form", [form for form in FORMS if "pieces" not in form])  # their rest is not known
def test_a_planted_circle_is_seen(form: str) -> None:
    """Inside the room data/: loader imports row_reader, and this order; order imports one of them."""
    for child in ("row_reader", "loader"):
        texts = {
            "lit_gpt/data/loader.py": "from lit_gpt.data import row_reader",
            "lit_gpt/data/row_reader.py": "from lit_gpt.data.order import x",
            "lit_gpt/data/order.py": "",
        }
        assert circle(texts) == []
        found = circle(texts | {"lit_gpt/data/order.py": planted(form, f"lit_gpt.data.{child}")})
        assert found[0] == found[-1]
        assert {"lit_gpt/data/order.py", f"lit_gpt/data/{child}.py"} <= set(found)


@pytest.mark.parametrize("source", SOURCES)
def test_modules_only_define(source: str) -> None:
    """A file's top level holds imports, constants, functions, classes, a program's shim and last line; no `global`.

    Only lit_gpt/__init__.py checks which Python it is, before anything else is imported.
    """
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
        is_check = source == "lit_gpt/__init__.py" and ast.unparse(node) == "_require_environment()"
        allowed = isinstance(node, defining) or is_docstring or is_registration or is_guard or is_shim or is_check
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
