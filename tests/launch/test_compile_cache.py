"""One folder for what is compiled: a second start compiles nothing anew; only a folder of one's own is taken."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lit_gpt.cli import BadInput
from lit_gpt.launch.compile_cache import FA4_SWITCH, FOLDER, PARTS, WITH_LOCKS, use_compile_cache
from tests.support.no_locks import without_locks
from tests.support.programs import environment

PROGRAM = """
from lit_gpt.launch.compile_cache import use_compile_cache
use_compile_cache()
import torch
from torch._dynamo.utils import counters
assert torch.compile(lambda x: (2 * x + 1).sum())(torch.ones(3)).item() == 9
print(counters["inductor"]["fxgraph_cache_hit"], counters["inductor"]["fxgraph_cache_miss"])
"""


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (FOLDER, FA4_SWITCH, *PARTS, *WITH_LOCKS):
        monkeypatch.setenv(name, "")  # so that what the test sets is undone
        monkeypatch.delenv(name)


@pytest.mark.long
def test_a_second_start_compiles_nothing_anew(tmp_path: Path) -> None:
    env = environment(COMPILE_CACHE_DIR=str(tmp_path / "compiled"))
    found = [
        subprocess.run(
            [sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, timeout=300, check=True
        )
        for _ in range(2)
    ]
    assert [done.stdout.split() for done in found] == [["0", "1"], ["1", "0"]]
    assert any((tmp_path / "compiled/inductor").rglob("*.so"))


def test_each_compiler_has_its_subfolder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable of the user's own wins."""
    monkeypatch.setenv(FOLDER, str(tmp_path / "new"))
    monkeypatch.setenv("TRITON_CACHE_DIR", "/mine")
    use_compile_cache()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == f"{tmp_path}/new/inductor"
    assert os.environ["TRITON_CACHE_DIR"] == "/mine"
    assert os.environ["FLASH_ATTENTION_CUTE_DSL_CACHE_DIR"] == f"{tmp_path}/new/fa4"
    assert os.environ["FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED"] == "1"
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700


def test_without_locks_only_caches_that_need_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path))
    without_locks(monkeypatch)
    use_compile_cache()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == f"{tmp_path}/inductor"
    assert not {FA4_SWITCH, *WITH_LOCKS} & os.environ.keys()


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o1777])
def test_a_folder_that_others_can_write_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int) -> None:
    tmp_path.chmod(mode)
    monkeypatch.setenv(FOLDER, str(tmp_path))
    with pytest.raises(BadInput, match=rf"COMPILE_CACHE_DIR={tmp_path}: others can write to it.*chmod go-w"):
        use_compile_cache()


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(FOLDER, f"{tmp_path}/file/cache")
    with pytest.raises(BadInput, match=r"it cannot be written \(Not a directory\)"):
        use_compile_cache()


def test_nothing_is_set_where_the_site_names_no_folder() -> None:
    before = dict(os.environ)
    use_compile_cache()
    assert dict(os.environ) == before
