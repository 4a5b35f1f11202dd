"""Peak memory of a build from long texts: of JSON lines it does not grow, of Parquet with a page of the text column."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lit_gpt.data.token_store import TokenStore
from tests.prepare.test_prepare_data import PROGRAM, arguments
from tests.support.processes import ROOT
from tests.support.small_tokenizer import write_byte_level

TEXT_BYTES = 2_400_000
MEASURED = f"""
import runpy
try:
    runpy.run_path({str(PROGRAM)!r}, run_name="__main__")
finally:
    print(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
"""


WORD = " " + 31 * "Haus"
"""A token: so that tokenising takes little time, and ids little memory, beside the text."""


def texts(count: int) -> Iterator[str]:
    """Texts of TEXT_BYTES that differ."""
    for number in range(count):
        yield f"{number}\n{WORD * (TEXT_BYTES // len(WORD))}"


def write_jsonl(path: Path, count: int) -> None:
    with path.open("w") as file:
        file.writelines(json.dumps({"id": n, "text": text}) + "\n" for n, text in enumerate(texts(count)))


def write_parquet(path: Path, count: int, rows_of_a_page: int) -> None:
    """One row group; its size on disk is that of its text."""
    table = pa.table({"id": list(map(str, range(count))), "text": pa.array(texts(count), pa.large_string())})
    pq.write_table(table, path, row_group_size=count, compression="none", write_batch_size=rows_of_a_page)


def peak(source: Path, tokenizer: Path, out: Path) -> int:
    """Peak memory in bytes of the builder, which is its own worker."""
    command = arguments(source, tokenizer, out, "--run_bytes", 1 << 20, "--shard_tokens", 1 << 19)
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *map(str, command)],
        env={**os.environ, "PYTHONPATH": ROOT}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return 1024 * int(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("count", [20, pytest.param(200, marks=pytest.mark.long)])
def test_memory_is_bounded_by_a_page(tmp_path: Path, count: int) -> None:
    """Beside one text as JSON lines: many as JSON lines, in one page of Parquet, and (long) in a page each."""
    tokenizer = write_byte_level(tmp_path / "tokenizer", [WORD * 100])
    write_jsonl(tmp_path / "one.jsonl", 1)
    least = peak(tmp_path / "one.jsonl", tokenizer, tmp_path / "one")
    cases: list[tuple[str, int | None, float]] = [
        ("lines", None, 10 * TEXT_BYTES),
        ("page", count, (2 * count + 12) * TEXT_BYTES),
    ]
    if count > 20:
        cases.append(("pages", 1, 20 * TEXT_BYTES))
    for name, rows_of_a_page, most in cases:
        source = tmp_path / (f"{name}.parquet" if rows_of_a_page else f"{name}.jsonl")
        if rows_of_a_page:
            write_parquet(source, count, rows_of_a_page)
        else:
            write_jsonl(source, count)
        more = peak(source, tokenizer, tmp_path / name) - least
        print(f"{count} texts, {name}: {more / 1e6:.0f} MB more than the {least / 1e6:.0f} MB of one text")
        assert more < most
        store = TokenStore.open(tmp_path / name / "train")
        assert store.text_bytes > 0.9 * count * (TEXT_BYTES - len(WORD))
