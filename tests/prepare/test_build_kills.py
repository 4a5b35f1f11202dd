"""A build that is killed at random moments, again and again: the same command goes on, to the same bytes."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.prepare.test_prepare_data import PROGRAM, ROOT, arguments, data_of, lines_of, made_up, run, tokenizer

__all__ = ["tokenizer"]

READY = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import runpy, lit_gpt.prepare.store_builder
print(flush=True)
runpy.run_path({str(PROGRAM)!r}, run_name="__main__")
"""
"""The program, which first says when it has its imports: what comes after that is worth a kill."""


class KilledBuilds:
    """Builds in folders under `out`, each killed until it ends by itself; every finished one is compared."""

    def __init__(self, out: Path, command: list[object], whole: dict[str, bytes], random_: random.Random) -> None:
        self.kills = self.finished = 0
        self._out, self._command, self._whole, self._random = out, command, whole, random_
        self._duration_s = self._start(None)

    def _folder(self) -> Path:
        return self._out / str(self.finished)

    def kill_once(self) -> None:
        """Start the build and kill it; one that ended first is compared, and the next start begins another."""
        self._start(self._random.uniform(0, 1.1 * self._duration_s))

    def end(self) -> None:
        """Let the build that is under way come to its end."""
        self._start(None)

    def _start(self, after_s: float | None) -> float:
        """Start the build, and kill it after `after_s`; the seconds that it took."""
        command = [*self._command, "--destination_path", self._folder()]
        process = subprocess.Popen(
            [sys.executable, "-c", READY, *map(str, command)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "\n"
        began_s = time.monotonic()
        try:
            _, errors = process.communicate(timeout=after_s)
        except subprocess.TimeoutExpired:
            # the builder alone, whose workers go on to the end of their task, or all at once
            (os.kill if self._random.random() < 0.5 else os.killpg)(process.pid, signal.SIGKILL)
            process.communicate()
            self.kills += 1
            return time.monotonic() - began_s
        assert process.returncode == 0, errors
        assert data_of(self._folder()) == self._whole
        assert sorted(path.name for path in self._folder().iterdir()) == [
            "lengths.png", "rejects.jsonl", "summary.json", "train", "val"
        ]  # fmt: skip
        self.finished += 1
        return time.monotonic() - began_s


@pytest.mark.slow
@pytest.mark.parametrize(
    ("workers", "kills"),
    [(1, 3), pytest.param(1, 50, marks=pytest.mark.long), pytest.param(2, 50, marks=pytest.mark.long)],
)
def test_same_bytes_after_kills_at_random_moments(tokenizer: Path, tmp_path: Path, workers: int, kills: int) -> None:
    """One file of two pieces or more for each reader that cuts them: lines, a table, plain text."""
    source = tmp_path / "corpus"
    source.mkdir()
    (source / "a.jsonl").write_bytes(lines_of(made_up(7_000)) + b"{\n")
    (source / "b.csv").write_text("id,text\n" + "".join(f"b{n},{'Wort ' * 40}\n" for n in range(3_000)))
    (source / "c.txt").write_text("ein Text in einer eigenen Datei")
    common = ["--source", source, "--tokenizer_path", tokenizer, "--shard_tokens", 200_000, "--val_fraction", 0.1]
    run(*arguments(source, tokenizer, tmp_path / "whole", *common[4:]))
    command = [*common, "--run_bytes", 300_000, "--workers", workers]
    seed = workers * 1000 + kills
    builds = KilledBuilds(tmp_path / "killed", command, data_of(tmp_path / "whole"), random.Random(seed))
    while builds.kills < kills:
        builds.kill_once()
    builds.end()
    print(f"{builds.kills} kills, {builds.finished} builds")
