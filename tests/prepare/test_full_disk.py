"""A build on a disk that is full or fails: one line with path and need, nothing lost, the same command goes on."""

from __future__ import annotations

import errno
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lit_gpt.prepare import streams
from tests.prepare.test_prepare_data import PROGRAM, arguments, data_of, lines_of, made_up, run, tokenizer
from tests.support.processes import ROOT
from tests.support.training import small_disk, small_quota

__all__ = ["tokenizer"]


def build(*argv: object, limit_bytes: int | None = None) -> tuple[int, str]:
    """Exit code and errors of the program; with limit_bytes no file may grow larger (EFBIG)."""
    code = f"import resource, runpy; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit_bytes}, {limit_bytes}))\n"
    code = (code if limit_bytes else "import runpy\n") + f"runpy.run_path({str(PROGRAM)!r}, run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, argv)],
        env={**os.environ, "PYTHONPATH": ROOT}, capture_output=True, text=True,
    )  # fmt: skip
    return done.returncode, done.stderr


def last_line(errors: str) -> str:
    assert "Traceback" not in errors, errors
    return errors.splitlines()[-1]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """2 MB of text: 4 MB of ids, as this tokenizer has one for each byte, and 4 MB once more in shards."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines_of(made_up(11_000)))
    return path


def flags(source: Path, tokenizer: Path, out: Path, workers: int = 1) -> list[object]:
    return arguments(source, tokenizer, out, "--run_bytes", 500_000, "--shard_tokens", 500_000, "--workers", workers)


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "megabytes", "stage"), [(1, 2, "runs"), (2, 7, "train")])
def test_a_full_disk_is_one_line_and_the_same_command_goes_on(
    source: Path, tokenizer: Path, tmp_path: Path, workers: int, megabytes: int, stage: str
) -> None:
    """Full while tokenising in the builder itself, and while a worker writes shards."""
    run(*flags(source, tokenizer, tmp_path / "whole"))
    with small_disk(tmp_path / "disk", size=megabytes << 20) as disk:
        code, errors = build(*flags(source, tokenizer, disk / "data", workers))
        said = last_line(errors)
        assert code == 1
        assert f"error: {disk}/data/" in said
        assert f"/{stage}/" in said
        assert "No space left on device" in said
        found = re.search(r"about ([\d,]+) more bytes are needed", said)
        assert found, said
        need = int(found[1].replace(",", ""))
        free = 8.6e6 - (megabytes << 20)  # what the whole takes, 100 bytes a document included, less what was there
        # of what the workers have written, the newest is not told yet: at most the 4 MB of all shards are counted anew
        assert 0.3 * free < need < max(2 * free, 4.2e6)
        subprocess.run(["mount", "-o", "remount,size=40m", str(disk)], check=True)
        assert "continuing the unfinished build" in run(*flags(source, tokenizer, disk / "data", workers))
        assert data_of(disk / "data") == data_of(tmp_path / "whole")


@pytest.mark.slow
def test_a_quota_is_one_line(source: Path, tokenizer: Path, tmp_path: Path) -> None:
    with small_quota(tmp_path / "disk", size=2 << 20) as disk:
        code, errors = build(*flags(source, tokenizer, disk / "data"))
        assert code == 1
        assert re.search(r"error: .*Disk quota exceeded.* more bytes are needed", last_line(errors))


@pytest.mark.slow
def test_a_limit_of_file_sizes_is_one_line(source: Path, tokenizer: Path, tmp_path: Path) -> None:
    code, errors = build(*flags(source, tokenizer, tmp_path / "data"), limit_bytes=200_000)
    assert code == 1
    assert re.search(r"error: .*\.data: File too large; 200,000 of [\d,]+ bytes were written", last_line(errors))


class FailingDisk(io.BytesIO):
    """Fails after a MiB."""

    def read(self, size: int | None = -1) -> bytes:
        if self.tell() > 1 << 20:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return super().read(size)


def test_a_source_that_cannot_be_read_is_named(
    source: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was lost is no reject, and a later start reads all."""
    with monkeypatch.context() as patched:
        patched.setattr(streams, "open", lambda path, *_: FailingDisk(Path(path).read_bytes()), raising=False)
        with pytest.raises(OSError, match="Input/output error") as raised:
            run(*flags(source, tokenizer, tmp_path / "data"))
        assert raised.value.filename == str(source)
    run(*flags(source, tokenizer, tmp_path / "data"))
    run(*flags(source, tokenizer, tmp_path / "whole"))
    assert data_of(tmp_path / "data") == data_of(tmp_path / "whole")
