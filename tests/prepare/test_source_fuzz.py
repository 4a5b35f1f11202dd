"""Seeded mutations of source files: the right documents, rejects that add up, or one line; nothing else."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import random
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lit_gpt.cli import BadInput
from lit_gpt.prepare.document_source import read_documents
from lit_gpt.prepare.records import Document, Fields
from lit_gpt.prepare.reject_guard import RejectGuard
from lit_gpt.prepare.source_files import open_sources

RECORDS = [{"id": str(n), "text": f"Satz {n}: " + "Straße, [Füchse] {x} " * (n % 9)} for n in range(300)]
LINES = b"".join(json.dumps(record, ensure_ascii=False).encode() + b"\n" for record in RECORDS)


def parquet(path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(RECORDS), path, row_group_size=60, write_page_checksum=True)


def arrow(path: Path) -> None:
    table = pa.Table.from_pylist(RECORDS)
    with pa.ipc.new_stream(str(path), table.schema) as file:
        file.write_table(table, max_chunksize=60)


MAKERS: dict[str, Callable[[Path], object]] = {
    "a.parquet": parquet,
    "a.arrow": arrow,
    "a.jsonl": lambda path: path.write_bytes(LINES),
    "a.json": lambda path: path.write_bytes(json.dumps(RECORDS, indent=1).encode()),
    "a.jsonl.gz": lambda path: path.write_bytes(gzip.compress(LINES, mtime=0)),
    "a.jsonl.zst": lambda path: path.write_bytes(pa.Codec("zstd").compress(LINES, asbytes=True)),
    "a.jsonl.bz2": lambda path: path.write_bytes(bz2.compress(LINES[:9000]) + bz2.compress(LINES[9000:])),
    "a.jsonl.xz": lambda path: path.write_bytes(lzma.compress(LINES)),
}
CHECKED = ("a.parquet", "a.jsonl.gz", "a.jsonl.bz2", "a.jsonl.xz")
"""Formats whose checksums find a wrong byte of a text (of gzip: after what the byte stood in was read)."""


def mutated(data: bytes, rng: random.Random) -> bytes:
    at, count = rng.randrange(len(data)), rng.choice((1, 1, 4, 16, 300))
    kind = rng.randrange(4)
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + data[at + count :]
    if kind == 2:
        return data[:at] + rng.randbytes(count) + data[at:]
    return data[:at] + bytes(byte ^ rng.randrange(1, 256) for byte in data[at : at + count]) + data[at + count :]


def check(path: Path, *, allow: bool) -> bool:
    """Read the file; whether it was refused, in one line. What is read whole and unrejected must be all there is."""
    guard = RejectGuard(1.0, allow)
    documents: list[Document] = []
    try:
        documents = list(
            read_documents(open_sources([str(path)], Fields(), allow_damaged_files=allow), Fields(), guard)
        )
    except BadInput as error:
        assert "\n" not in str(error)  # noqa: PT017 (most mutations are refused, not all)
        return True
    assert guard.lines == len(documents) + guard.rejects
    assert len({document.line for document in documents}) == len(documents)
    if path.name in CHECKED and not guard.rejects:
        whole = [(record["id"], record["text"]) for record in RECORDS]
        assert [(document.id, document.text) for document in documents] == whole
    if path.suffix == ".parquet":
        assert guard.lines == len(RECORDS)
    return False


@pytest.mark.parametrize("rounds", [25, pytest.param(1500, marks=pytest.mark.long)])
@pytest.mark.parametrize("name", MAKERS)
def test_mutations(tmp_path: Path, name: str, rounds: int) -> None:
    path = tmp_path / name
    MAKERS[name](path)
    data = path.read_bytes()
    assert not check(path, allow=False)
    rng = random.Random(17)
    refused = 0
    for _ in range(rounds):
        path.write_bytes(mutated(data, rng))
        refused += check(path, allow=False)
        check(path, allow=True)
    assert refused > 0 or name == "a.jsonl"
