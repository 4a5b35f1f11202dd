"""Ways to run the code: from a checkout without installing, from the requirements, from a wheel."""

from __future__ import annotations

import json
import os
import shutil
import site
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from lit_gpt.cli import EXIT_BAD_INPUT, EXIT_OK
from scripts.fetch_german_text import from_grammar
from tests.support.programs import environment
from tests.support.training import command
from tests.test_layering import rooms

ROOT = Path(__file__).resolve().parents[1]


def python(*arguments: object, first: Path, cwd: Path) -> str:
    """What Python prints that finds packages in `first`, then the installed ones but those installed as a link."""
    path = os.pathsep.join([str(first), *site.getsitepackages()])
    done = subprocess.run(
        [sys.executable, "-S", *map(str, arguments)], env=environment(PYTHONPATH=path), cwd=cwd, capture_output=True,
        text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == EXIT_OK, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("program", "before", "message"),
    [
        ("pretrain/tinyllama_fabric.py", "", "lacks the package "),
        ("scripts/prepare_data.py", "", "lacks the package "),
        ("scripts/demo.py", "", "lacks the package "),
        ("scripts/train_tokenizer.py", "sys.version_info = (3, 9, 18)", "Python 3.10 to 3.14 is needed, "),
    ],
)
def test_another_python_is_one_line(tmp_path: Path, program: str, before: str, message: str) -> None:
    """-I -S: an interpreter that has no packages."""
    path = str(ROOT / program)
    code = f"import sys, runpy; sys.argv = [{path!r}]; {before}\nrunpy.run_path({path!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (EXIT_BAD_INPUT, "", 1), done.stderr
    assert message in done.stderr
    assert f"python3 -m venv .venv-train && .venv-train/bin/pip install -r {ROOT}/requirements.txt" in done.stderr


def test_another_packages_absence_is_told_as_ever(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text("import lit_gpt, absent_package")
    done = subprocess.run([sys.executable, program], env=environment(), capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == "ModuleNotFoundError: No module named 'absent_package'"


@pytest.mark.slow
@pytest.mark.distributed
def test_a_checkout_runs_uninstalled_with_its_processes(tmp_path: Path) -> None:
    """Documents to a trained step from another folder, in two workers and two ranks, beside another lit_gpt.

    Each of those processes starts anew, a rank without -S; the other lit_gpt ends whoever imports it.
    """
    other = tmp_path / "other"
    other.mkdir()
    (other / "lit_gpt.py").write_text("raise SystemExit(f'{__file__} was imported')")
    with (tmp_path / "text.jsonl").open("w") as file:
        file.writelines(json.dumps(document._asdict()) + "\n" for document in from_grammar(300))

    train_tokenizer = "--source text.jsonl --destination_path tokenizer --vocab_size 300"
    prepare = "--source text.jsonl --tokenizer_path tokenizer --destination_path data --val_fraction 0.1 --workers 2"
    _, *train = command(Path("data"), Path("run"), max_steps=1, warmup_steps=0, devices=2, tokenizer_path="tokenizer")
    python(ROOT / "scripts/train_tokenizer.py", *train_tokenizer.split(), first=other, cwd=tmp_path)
    python(ROOT / "scripts/prepare_data.py", *prepare.split(), first=other, cwd=tmp_path)
    python(*train, first=other, cwd=tmp_path)
    assert (tmp_path / "run/iter-00000001-ckpt.pth").is_dir()


def test_the_clusters_requirements_are_the_projects(tmp_path: Path) -> None:
    """pip follows the file to the same list, from any folder; it installs and asks nothing."""
    pip = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-index", "--no-deps", "--requirement"]
    found = []
    for name in ("requirements.txt", "cluster/building/requirements.txt"):
        done = subprocess.run([*pip, ROOT / name], cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        found.append({line.split(" in ")[0] for line in done.stdout.splitlines()})
    assert found[0] == found[1]
    assert any(line.startswith("Requirement already satisfied: torch") for line in found[0])


def test_a_wheel_holds_every_room(tmp_path: Path) -> None:
    source, unpacked = tmp_path / "source", tmp_path / "unpacked"
    shutil.copytree(ROOT / "lit_gpt", source / "lit_gpt", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "requirements.txt", "license.md"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*pip, "--wheel-dir", tmp_path, source], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(unpacked)
    packed = {path.relative_to(unpacked) for path in unpacked.glob("lit_gpt/**/*") if path.is_file()}
    assert packed == {path.relative_to(source) for path in (source / "lit_gpt").rglob("*") if path.is_file()}
    names = [f"lit_gpt.{Path(entry).stem}" for entry in rooms()]
    code = f"import importlib\nfor name in {names}: print(importlib.import_module(name).__file__)"
    files = python("-c", code, first=unpacked, cwd=tmp_path).split()
    assert len(files) == len(names)
    assert all(Path(file).is_relative_to(unpacked) for file in files), files
