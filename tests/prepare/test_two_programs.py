"""train_tokenizer and prepare_data on the same sources: each kind of file, and the examples of docs/data.md."""

from __future__ import annotations

import gzip
import importlib.util
import json
import logging
import lzma
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.prepare.test_prepare_data import ROOT, lines_of, made_up, read_all, run

RECORDS = made_up(40)
TEXTS = sorted(record["text"] for record in RECORDS)


def train_tokenizer(caplog: pytest.LogCaptureFixture, *argv: object) -> str:
    """Run the program in this process; what it logs."""
    spec = importlib.util.spec_from_file_location("train_tokenizer", ROOT / "scripts/train_tokenizer.py")
    assert spec is not None
    assert spec.loader is not None
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    caplog.clear()
    with caplog.at_level(logging.INFO):
        program.main([*map(str, argv), "--vocab_size", "270"])
    return caplog.text


def csv(separator: str, *names: str) -> bytes:
    rows = [separator.join(names), *(separator.join([record["id"], record["text"]]) for record in RECORDS)]
    return "\n".join(rows).encode()


def texts(folder: Path) -> None:
    folder.mkdir()
    for number, record in enumerate(RECORDS):
        (folder / f"{number}.txt").write_text(record["text"])


def books_and_lines(folder: Path) -> None:
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(lines_of(RECORDS[:20]))
    (folder / "sub").mkdir()
    (folder / "sub/b.json.gz").write_bytes(gzip.compress(json.dumps(RECORDS[20:30]).encode()))
    pq.write_table(pa.Table.from_pylist(RECORDS[30:]), folder / "sub/c.parquet")


def saved(folder: Path) -> None:
    """As save_to_disk of `datasets`."""
    folder.mkdir()
    table = pa.Table.from_pylist(RECORDS)
    with pa.ipc.new_stream(str(folder / "data-00000-of-00001.arrow"), table.schema) as file:
        file.write_table(table)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))
    (folder / "dataset_info.json").write_text("{}")


def web(path: Path) -> None:
    rows = [{"content": record["text"], "meta": {"url": record["id"]}} for record in RECORDS]
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=7)


CASES: dict[str, tuple[Callable[[Path], object], list[str], list[str]]] = {
    "a.json.xz": (lambda path: path.write_bytes(lzma.compress(json.dumps(RECORDS).encode())), [], []),
    "table.csv": (
        lambda path: path.write_bytes(csv(",", "key", "body")), ["--text_field", "body"], ["--id_field", "key"]
    ),
    "books": (texts, [], []),
    "corpus": (books_and_lines, [], []),
    "saved": (saved, [], []),
    "web.parquet": (web, ["--text_field", "content"], ["--id_field", "meta.url"]),
}  # fmt: skip
"""File or folder: how it is made, the flags of both programs, and those of prepare_data alone."""


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_both_programs_read_the_same(tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str) -> None:
    make, both, more = CASES[name]
    source, tokenizer, out = tmp_path / name, tmp_path / "tokenizer", tmp_path / "data"
    make(source)
    said = train_tokenizer(caplog, "--source", source, "--destination_path", tokenizer, *both)
    assert "trained on 40 documents, " in said
    assert "rejected 0 lines" in said
    (tmp_path / "lines.jsonl").write_bytes(lines_of(RECORDS))
    train_tokenizer(caplog, "--source", tmp_path / "lines.jsonl", "--destination_path", tmp_path / "same")
    assert (tokenizer / "tokenizer.json").read_bytes() == (tmp_path / "same/tokenizer.json").read_bytes()
    command = ["--source", source, "--tokenizer_path", tokenizer, "--destination_path", out, *both, *more]
    assert "40 lines in, 40 documents; rejected: none" in run(*command, "--workers", 1)
    found = read_all(out / "train", tokenizer) + read_all(out / "val", tokenizer)
    assert sorted(text for _, text, *_ in found) == TEXTS
    if name != "books":
        assert {id for id, *_ in found} == {record["id"] for record in RECORDS}
