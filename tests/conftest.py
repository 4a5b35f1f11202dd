"""Fixtures that every tier of tests shares."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.german_run import make_german_run
from tests.support.training import make_store

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared() -> Path:
    """The developers' folder beside the checkout (tokenizer, German corpus); tests that need it skip without it."""
    folder = ROOT.parent / "shared"
    if not (folder / "tokenizer" / "tokenizer.json").is_file():
        pytest.skip("the developers' folder ../shared is not here")
    return folder


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small made store with the splits train and val; tests only read it."""
    return make_store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="session")
def german_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder that tests/support/german_run.py makes; tests only read it."""
    return make_german_run(tmp_path_factory.mktemp("german"))
