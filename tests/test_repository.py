"""The repository agrees with itself: what the documents name exists, and what the code imports is declared."""

from __future__ import annotations

import dataclasses
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import lit_gpt
from lit_gpt.train.settings import Settings
from tests.support.resumed_settings import CASES
from tests.test_layering import SOURCES, imports

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted((ROOT / "pretrain/configs").glob("*.yaml"))
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCED = re.compile(r"^```(?:bash|sh)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def tracked() -> list[Path]:
    """The files that git tracks."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


def commands() -> list[list[str]]:
    """Every command in a bash block of README.md, CONTRIBUTING.md and the tutorials, split as a shell would."""
    found = []
    for document in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs/tutorials").glob("*.md"))):
        for block in FENCED.findall(document.read_text(encoding="utf-8")):
            lines = block.replace("\\\n", " ").splitlines()
            found += [words for line in lines if (words := shlex.split(line, comments=True))]
    return found


def read_yaml(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def program_in(command: list[str]) -> str | None:
    return next((word for word in command if re.fullmatch(r"(scripts|pretrain)/\w+\.py", word)), None)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_holds_settings_only(recipe: Path) -> None:
    from lit_gpt.corpus.settings import CorpusSettings
    from lit_gpt.train.settings import Settings

    kind = CorpusSettings if recipe.stem.startswith("corpus_") else Settings
    known = {field.name for field in dataclasses.fields(kind)}
    keys = set(yaml.safe_load(recipe.read_text(encoding="utf-8")))
    assert keys <= known, f"{recipe.name} has keys that are no settings: {sorted(keys - known)}"


def test_programs_in_the_documents_exist() -> None:
    named = re.compile(r"\b(?:scripts|pretrain|lit_gpt|tests|docs|cluster)/[\w/.-]*\w")
    for document in DOCUMENTS:
        for path in named.findall(document.read_text(encoding="utf-8")):
            assert (ROOT / path).exists(), f"{document.name} names {path}"


def test_make_targets_in_the_documents_exist() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for document in DOCUMENTS:
        for target in re.findall(r"`make (\w+)`", document.read_text(encoding="utf-8")):
            assert target in targets, f"{document.name} names make {target}"


def test_every_page_of_the_documentation_has_its_place_on_the_site() -> None:
    """In the list of mkdocs.yml; the reference is made by docs/site/reference.py."""
    named = set(re.findall(r"[\w/]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8")))
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert named == pages | {"reference/settings.md", "reference/programs.md"}


@pytest.mark.parametrize("program", sorted({program for command in commands() if (program := program_in(command))}))
def test_flags_in_the_documents_exist(program: str) -> None:
    helped = subprocess.run(
        [sys.executable, ROOT / program, "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    for command in commands():
        if program in command:
            flags = {word.split("=")[0] for word in command[command.index(program) :] if word.startswith("--")}
            assert flags <= set(re.findall(r"--\w+", helped.stdout)), command


def test_requirements_give_their_reason() -> None:
    reasons = (ROOT / "docs/installation.md").read_text(encoding="utf-8")
    for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines():
        if name := re.match(r"[\w-]+", line):
            assert f"| `{name[0]}`" in reasons, f"docs/installation.md does not say why {name[0]} is needed"
            assert "==" in line or (">=" in line and "<" in line), f"{name[0]} is not bounded on both sides"


def test_imports_are_declared() -> None:
    """A third-party package that the product imports is in requirements.txt, in an extra, or apart, with the reason."""
    declared = "\n".join((ROOT / name).read_text(encoding="utf-8") for name in ("requirements.txt", "setup.py"))
    declared = declared.lower().replace("_", "-")
    apart = {"flash_attn", "flash_attn_interface", "quack", "xformers", "triton"}  # kernels; triton comes with torch
    apart |= {"litgpt"}  # scripts/benchmark_litgpt.py says how
    for source in SOURCES:
        roots = {name.split(".")[0] for name in imports((ROOT / source).read_text(encoding="utf-8"))}
        for name in roots - {"lit_gpt"} - apart - sys.stdlib_module_names:
            package = {"yaml": "pyyaml", "pynvml": "nvidia-ml-py"}.get(name, name.replace("_", "-"))
            assert re.search(rf"^\W*{package}\b", declared, re.MULTILINE), f"{source} imports {name}"


def test_no_path_of_one_machine_and_no_secret() -> None:
    here = re.compile("|".join(re.escape(f"{path}/") for path in (ROOT, ROOT.parent / "shared")).encode())
    secret = re.compile(rb"\bhf_[A-Za-z0-9]{30,}|WANDB_API_KEY=\w|AKIA[0-9A-Z]{16}")
    for path in tracked():
        text = path.read_bytes()
        assert not here.search(text), f"{path.name}: {here.search(text)}"
        assert not secret.search(text), f"{path.name} holds what looks like a key"


def test_every_way_to_check_runs_what_contributors_run() -> None:
    """.ci/run is the Makefile's targets, the hosted workflow is .ci/run, a commit is `make check`: nothing else."""
    script = ROOT / ".ci/run"
    lines = [line for line in script.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    assert lines == [
        "set -euo pipefail",
        'cd "$(dirname "$0")/.."',
        "make check",
        "make docs",
        "make test",
        "make demo",
    ]
    assert script.stat().st_mode & 0o111, ".ci/run is not executable"

    (job,) = read_yaml(".github/workflows/ci.yml")["jobs"].values()
    checkout, python, run = job["steps"]
    assert checkout.keys() == {"uses"}
    assert checkout["uses"].startswith("actions/checkout@")
    assert python["uses"].startswith("actions/setup-python@")
    assert python["with"] == {"python-version": "${{ matrix.python }}"}
    assert run == {"run": ".ci/run"}
    promised = re.search(r'python_requires=">=3\.(\d+),<3\.(\d+)"', (ROOT / "setup.py").read_text(encoding="utf-8"))
    assert promised
    assert job["strategy"]["matrix"]["python"] == [f"3.{promised[1]}", f"3.{int(promised[2]) - 1}"]

    ((hook,),) = (repository["hooks"] for repository in read_yaml(".pre-commit-config.yaml")["repos"])
    assert hook["entry"] == "make check"
    assert (hook["language"], hook["pass_filenames"], hook["always_run"]) == ("system", False, True)


def test_the_citation_names_this_version_and_the_paper() -> None:
    citation = read_yaml("CITATION.cff")
    assert citation["version"] == lit_gpt.__version__
    assert f'license="{citation["license"]}"' in (ROOT / "setup.py").read_text(encoding="utf-8")
    (paper,) = citation["references"]
    assert [author["family-names"] for author in paper["authors"]] == ["Pfister", "Wunderle", "Hotho"]
    assert "10.48550/arXiv.2411.11171" in [identifier["value"] for identifier in paper["identifiers"]]


def test_every_setting_has_a_case_of_its_change_at_a_resume() -> None:
    """A new setting needs one: what is seen where it takes effect, or that it is refused."""
    assert sorted(CASES) == sorted(field.name for field in dataclasses.fields(Settings))
    without = [name for name, case in CASES.items() if case.seen is None and case.refused is None]
    of_a_plan = [name for name in CASES if name.startswith("plan")]
    assert without == [*of_a_plan, "resume", "allow_changed_data", "new_data"]
    assert all(name in case.change for name, case in CASES.items() if case.change)
