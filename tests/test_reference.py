"""The documentation's reference, which is made from the code, names every setting and every program."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from lit_gpt.train.settings import Settings

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reference", ROOT / "docs/site/reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_setting_is_there_once_with_its_default_and_meaning(reference: ModuleType) -> None:
    rows = re.findall(r"^\| `(\w+)` \| `(.+?)` \| (.*) `.+` \|$", reference.settings_page(), re.MULTILINE)
    assert sorted(name for name, _, _ in rows) == sorted(field.name for field in dataclasses.fields(Settings))
    by_name = {name: (default, meaning) for name, default, meaning in rows}
    assert by_name["learning_rate"] == ("0.00025", "Peak learning rate.")
    assert by_name["max_steps"][0] == "unset"
    assert by_name["report"][0] == "true"
    assert [name for name, (_, meaning) in by_name.items() if not meaning] == []


@pytest.mark.slow
def test_every_program_is_there_with_its_help(reference: ModuleType) -> None:
    page = reference.programs_page()
    named = re.findall(r"^## (\S+)$", page, re.MULTILINE)
    programs = [*(ROOT / "pretrain").glob("*.py"), *(ROOT / "scripts").glob("*.py")]
    assert set(named) >= {str(path.relative_to(ROOT)) for path in programs}
    assert named.count("scripts/create.sh") == 1
    assert "--serve PORT" in page
    assert "FINAL_MODEL     folder to write" in page
