"""Sources: every file of a folder is read or named, every record is a document or a reject, damage is never silent."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lit_gpt.cli import BadInput
from lit_gpt.prepare.document_source import read_documents, read_pieces
from lit_gpt.prepare.records import Document, Fields, Reject, parse_piece
from lit_gpt.prepare.reject_guard import RejectGuard
from lit_gpt.prepare.source_files import open_sources

FIELDS = Fields()
ONE, TWO = {"id": "1", "text": "Straße über Füchse"}, {"id": "2", "text": 'zwei\nZeilen, "gut"'}


def read(
    *paths: object, fields: Fields = FIELDS, allow: bool = False, outside: Path | None = None
) -> list[Document | Reject]:
    """All documents and rejects of the sources."""
    sources = open_sources([str(path) for path in paths], fields, allow_damaged_files=allow, outside=outside)
    guard = RejectGuard(1.0, allow)
    records: list[Document | Reject] = []
    for number, source in enumerate(sources):
        for piece in read_pieces(source, number, fields):
            guard.admit(source, piece)
            records += parse_piece(piece, fields)
    return records


def pairs(records: Sequence[Document | Reject]) -> list[tuple[str, str]]:
    """(id, text) of documents only; asserts that nothing was rejected."""
    assert not [record for record in records if isinstance(record, Reject)]
    return [(record.id, record.text) for record in records if isinstance(record, Document)]


def rejected(records: Sequence[Document | Reject]) -> list[tuple[int, str]]:
    return [(record.line, record.kind) for record in records if isinstance(record, Reject)]


def lines(*records: object) -> bytes:
    return b"".join(json.dumps(record, ensure_ascii=False).encode() + b"\n" for record in records)


def zst(data: bytes) -> bytes:
    return pa.Codec("zstd").compress(data, asbytes=True)


def name_of(value: object) -> str:
    """Of a parameter: the same in every worker, which the bytes of a gzip file, with its time, are not."""
    return value if isinstance(value, str) else "content"


JSONL = lines(ONE, TWO)
ARRAY = json.dumps([ONE, TWO], ensure_ascii=False, indent=1).encode()
CSV = 'id,text\n1,Straße über Füchse\n2,"zwei\nZeilen, ""gut"""\n'.encode()
BOTH = [("1", "Straße über Füchse"), ("2", 'zwei\nZeilen, "gut"')]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", JSONL),
        ("a.NDJSON", JSONL),
        ("a.JSONL", b"\n \n" + JSONL + b"\r\n\n"),
        ("a.json", ARRAY),
        ("a.json", b"\xef\xbb\xbf " + json.dumps([ONE, TWO]).encode() + b"\n"),
        ("a.json", JSONL),
        ("a.json", json.dumps(ONE, indent=2).encode() + b"\n" + json.dumps(TWO, indent=2).encode()),
        ("a.json.gz", gzip.compress(ARRAY)),
        ("a.jsonl.gz", gzip.compress(lines(ONE)) + gzip.compress(lines(TWO))),
        ("a.jsonl.xz", lzma.compress(lines(ONE)) + b"\0" * 4 + lzma.compress(lines(TWO))),
        ("a.jsonl.bz2", bz2.compress(lines(ONE)) + bz2.compress(lines(TWO))),
        ("a.jsonl.zst", zst(lines(ONE)) + zst(lines(TWO))),
        ("a.csv", CSV),
        ("a.csv.GZ", gzip.compress(b"\xef\xbb\xbf" + CSV.replace(b"\n1", b"\r\n1"))),
        ("a.csv", CSV.replace(b"id,text", b"id;text").replace(b"1,", b"1;").replace(b"2,", b"2;")),
        ("a.tsv", CSV.replace(b"id,text", b"id\ttext").replace(b"1,", b"1\t").replace(b"2,", b"2\t")),
    ],
    ids=name_of,
)
def test_kinds_of_text(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert pairs(read(tmp_path)) == BOTH
    assert pairs(read(tmp_path / name)) == BOTH


def test_plain_text_is_a_document_a_file(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfeins\n\nzwei\n")
    (tmp_path / "sub/a.TXT.xz").write_bytes(lzma.compress("über".encode()))
    assert pairs(read(tmp_path)) == [("", "eins\n\nzwei\n"), ("", "über")]
    assert [source.name for source in open_sources([str(tmp_path)], Fields())] == ["b.txt", "sub/a.TXT.xz"]


@pytest.mark.parametrize(
    "column",
    [
        pa.array([text for _, text in BOTH], pa.large_string()),
        pa.array([text for _, text in BOTH]).dictionary_encode(),
        pa.array([text.encode() for _, text in BOTH], pa.binary()),
        pa.array([text for _, text in BOTH], pa.string_view()),
    ],
    ids=["large_string", "dictionary", "binary", "string_view"],
)
def test_types_of_columns(tmp_path: Path, column: pa.Array) -> None:
    table = pa.table({"id": pa.array([1, 2], pa.uint16()), "text": column, "score": [0.1, 0.2]})
    pq.write_table(table, tmp_path / "a.PARQUET")
    assert pairs(read(tmp_path)) == BOTH
    for name, writer in (("a.arrow", pa.ipc.new_stream), ("b.arrow", pa.ipc.new_file)):
        with writer(str(tmp_path / name), table.schema) as file:
            file.write_table(table)
        assert pairs(read(tmp_path / name)) == BOTH


def test_columns_of_other_types_are_refused_with_the_way_out(tmp_path: Path) -> None:
    table = pa.table({"id": [0.5, 1.5], "text": ["eins", "zwei"], "parts": [["eins"], ["zwei"]]})
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(BadInput, match=r"column 'id' is of type double, .*--id_field names another, or '' for none"):
        read(tmp_path / "a.parquet")
    assert pairs(read(tmp_path / "a.parquet", fields=Fields("text", ""))) == [("", "eins"), ("", "zwei")]
    with pytest.raises(BadInput, match=r"column 'parts' is of type list<.*\(--text_field names another\)"):
        read(tmp_path / "a.parquet", fields=Fields("parts", ""))


def test_dotted_fields(tmp_path: Path) -> None:
    record = {"meta": {"source": {"key": "k"}, "x.y": "z"}, "doc": {"body": "Text"}, "a.b": "flach"}
    (tmp_path / "a.jsonl").write_bytes(lines(record))
    pq.write_table(pa.Table.from_pylist([record, {"doc": None}]), tmp_path / "b.parquet")
    for text, id, wanted in (
        ("doc.body", "meta.source.key", ("k", "Text")),
        ("a.b", "meta.x.y", ("z", "flach")),
        ("doc.body", "", ("", "Text")),
    ):
        fields = Fields(text, id)
        assert pairs(read(tmp_path / "a.jsonl", fields=fields)) == [wanted]
        if text == "doc.body":
            assert read(tmp_path / "b.parquet", fields=fields)[0][:3] == (1, *wanted)
            assert rejected(read(tmp_path / "b.parquet", fields=fields)) == [(2, "no text")]
    with pytest.raises(BadInput, match=r"has no column 'doc.title'. Columns: meta, doc, a.b"):
        read(tmp_path / "b.parquet", fields=Fields("doc.title"))


def test_content_is_the_text_of_a_table_without_text_unless_a_field_was_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"content": ["ja"], "id": ["a"]}), tmp_path / "a.parquet")
    assert pairs(read(tmp_path, fields=Fields(otherwise=("content",)))) == [("a", "ja")]
    with pytest.raises(BadInput, match=r"has no column 'text'. Columns: content, id"):
        read(tmp_path)


def test_folders_that_datasets_saved(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As save_to_disk of datasets 5 lays them out: two splits, one in two files; a stale file is named, not read."""
    for split, parts in (("test", [[ONE]]), ("train", [[TWO], [{"id": "3", "text": "drei"}]])):
        (tmp_path / split).mkdir()
        names = [f"data-{number:05d}-of-{len(parts):05d}.arrow" for number in range(len(parts))]
        for name, part in zip(names, parts, strict=True):
            table = pa.Table.from_pylist(part)
            with pa.ipc.new_stream(str(tmp_path / split / name), table.schema) as file:
                file.write_table(table)
        state = {"_data_files": [{"filename": name} for name in names], "_split": split}
        (tmp_path / split / "state.json").write_text(json.dumps(state))
        (tmp_path / split / "dataset_info.json").write_text("{}")
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["test", "train"]}')
    shutil.copy(tmp_path / "test/data-00000-of-00001.arrow", tmp_path / "test/stale.arrow")
    assert pairs(read(tmp_path)) == [*BOTH, ("3", "drei")]
    assert "stale.arrow (state.json beside it does not name it)" in caplog.text
    (tmp_path / "train/data-00001-of-00002.arrow").unlink()
    with pytest.raises(BadInput, match=r"data-00001-of-00002.arrow is missing, and state.json beside it names it"):
        read(tmp_path)


@pytest.mark.slow
def test_what_the_library_datasets_saves(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_list([ONE, TWO] * 500)
    made.select(range(0, 1000, 2)).save_to_disk(tmp_path / "saved", num_shards=3)
    assert pairs(read(tmp_path / "saved")) == BOTH[:1] * 500
    made.to_json(tmp_path / "lines.json")
    made.to_csv(tmp_path / "table.csv", index=False)
    made.to_parquet(tmp_path / "table.parquet")
    for name in ("lines.json", "table.csv", "table.parquet"):
        assert pairs(read(tmp_path / name)) == BOTH * 500


def test_every_file_of_a_folder_is_read_or_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Links are followed without loops; a file that two names lead to is read under its own."""
    corpus, elsewhere = tmp_path / "corpus", tmp_path / "elsewhere"
    for folder in (corpus / "b", corpus / ".git", elsewhere, corpus / "out/train"):
        folder.mkdir(parents=True)
    (corpus / "b/a.jsonl").write_bytes(lines(ONE))
    (corpus / "b/loop").symlink_to(corpus)
    (corpus / "a-link").symlink_to(corpus / "b")
    (corpus / "c.jsonl").symlink_to(elsewhere / "c.ndjson")
    (corpus / "linked").symlink_to(elsewhere)
    (corpus / "gone.jsonl").symlink_to(tmp_path / "nowhere.jsonl")
    (elsewhere / "c.ndjson").write_bytes(lines(TWO))
    (corpus / "d.csv").write_bytes(b"title,year\nx,1999\n")
    (corpus / "e.json").write_bytes(b'{"name": "settings"}')
    for name in ("README.md", "f.txt", ".hidden.jsonl", "out/train/g.jsonl", "x.jsonl.lz4", ".nfs0000000001"):
        (corpus / name).write_bytes(b"x")
    sources = open_sources([str(corpus)], Fields(), outside=corpus / "out")
    assert [source.name for source in sources] == ["b/a.jsonl", "linked/c.ndjson"]
    assert pairs(read(corpus, outside=corpus / "out")) == BOTH
    for name, reason in {
        "b/loop": "a folder that is read under another name",
        "a-link": "a folder that is read under another name",
        "c.jsonl": "a file that is read under another name",
        "gone.jsonl": "a link that leads nowhere",
        "d.csv": "no column 'text'",
        "e.json": "its first records have no text in a field 'text'",
        "f.txt": "plain text beside files of records",
        ".git": "hidden",
        ".hidden.jsonl": "hidden",
        ".nfs0000000001": "hidden",
        "README.md": "of no kind that is read",
        "x.jsonl.lz4": "of no kind that is read",
        "out": "the destination",
    }.items():
        assert any(f"{corpus / name}" in line and f"({reason}" in line for line in caplog.messages), (name, caplog.text)


def test_a_source_that_is_given_twice_is_read_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/a.jsonl").write_bytes(lines(ONE))
    (tmp_path / "b.jsonl").write_bytes(lines(TWO))
    os.link(tmp_path / "b.jsonl", tmp_path / "same.jsonl")
    assert pairs(read(tmp_path, tmp_path / "sub", tmp_path / "sub/../b.jsonl")) == BOTH[::-1]
    assert "same.jsonl" in caplog.text
    assert "(a file that is read under another name)" in caplog.text


def test_file_names_that_are_no_utf_8_survive(tmp_path: Path) -> None:
    raw = os.fsencode(tmp_path) + b"/caf\xe9"
    for ending, content in ((b".jsonl", lines(ONE)), (b".json.gz", gzip.compress(ARRAY))):
        with open(raw + ending, "wb") as file:
            file.write(content)
    pq.write_table(pa.Table.from_pylist([TWO]), tmp_path / "a.parquet")
    os.rename(os.fsencode(tmp_path) + b"/a.parquet", raw + b".parquet")
    sources = open_sources([str(tmp_path)], Fields())
    assert [source.name for source in sources] == ["caf\\xe9.json.gz", "caf\\xe9.jsonl", "caf\\xe9.parquet"]
    assert pairs(read(tmp_path)) == [*BOTH, BOTH[0], BOTH[1]]


# Records that are bad


def test_bad_elements_of_an_array_cost_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = [
        b"{'id': 1}", b'"ein Text"', b'{"id": "x", "text": 5}', b'{"text": "\xff"}', b'{"text": "a\nb"}', b"",
        b'{"text": "' + b"x" * (17 << 20) + b'\\\\"}', b'{"text": "]}, {", "n": [[{}], "\\""]}', b'{"id": "y"}',
    ]  # fmt: skip
    good = json.dumps(ONE).encode()
    (tmp_path / "a.json").write_bytes(b"[" + b",\n".join(part for one in bad for part in (good, one)) + b"\n,]\n\n")
    records = read(tmp_path / "a.json")
    assert rejected(records) == [
        (2, "bad JSON"), (4, "bad JSON"), (6, "no text"), (8, "bad UTF-8"), (10, "bad JSON"), (13, "too long"),
        (17, "no text"),
    ]  # fmt: skip
    assert [record.line for record in records if isinstance(record, Document)] == [1, 3, 5, 7, 9, 11, 12, 14, 15, 16]
    assert records[14][2] == "]}, {"
    monkeypatch.setattr("lit_gpt.prepare.streams.PIECE_BYTES", 70_001)  # the same, wherever blocks end
    assert read(tmp_path / "a.json") == records


def test_bad_rows_of_a_csv_cost_no_other(tmp_path: Path) -> None:
    content = b'id,text\n1,gut\n2\n3,zu,viel\n4,\xe4\xf6\n\n5,"a"b\n6,""\n7,"auch\ngut"\n8,gut\n'
    (tmp_path / "a.csv").write_bytes(content)
    records = read(tmp_path / "a.csv")
    assert rejected(records) == [(3, "bad CSV"), (4, "bad CSV"), (5, "bad UTF-8"), (7, "bad CSV"), (8, "empty")]
    assert [(record.line, record[2]) for record in records if isinstance(record, Document)] == [
        (2, "gut"), (9, "auch\ngut"), (11, "gut"),
    ]  # fmt: skip
    (tmp_path / "a.csv").write_bytes(content + b'9,"nie zu\n' + b"10,x\n" * 1000)
    with pytest.raises(BadInput, match=r"a.csv cannot be read from line 12 on \(a quote is never closed"):
        read(tmp_path / "a.csv")
    assert rejected(read(tmp_path / "a.csv", allow=True))[-1] == (12, "cut short")


def test_rows_that_an_unmatched_quote_takes_are_all_rejected(tmp_path: Path) -> None:
    """By a program that quotes nothing: row 2 begins a quote, which row 900 seems to end."""
    quoted = (2, 900)
    rows = [f"{n}," + ('"Guten' if n in quoted else "Guten") + " Tag" for n in range(1000)]
    (tmp_path / "a.csv").write_text("\n".join(["id,text", *rows, ""]))
    records = read(tmp_path / "a.csv")
    assert [record.line for record in records] == list(range(2, 1002))
    assert rejected(records) == [(line, "bad CSV") for line in range(4, 903)]
    kept = [(record.id, record.text) for record in records if isinstance(record, Document)]
    assert kept == [(str(n), "Guten Tag") for n in (0, 1, *range(901, 1000))]
    (tmp_path / "a.csv").write_text('id,text\n1,"zwei\nZeilen",mehr\n2,gut\n')
    records = read(tmp_path / "a.csv")
    assert rejected(records) == [(2, "bad CSV"), (3, "bad CSV")]
    assert records[-1][:3] == (4, "2", "gut")


def test_plain_text_that_is_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An empty file of a folder is named, and costs the others nothing; bytes of another kind are refused."""
    (tmp_path / "a.txt").write_bytes(b"")
    (tmp_path / "b.txt").write_bytes(b"PAR1 BZh <html> Text")
    assert pairs(read(tmp_path)) == [("", "PAR1 BZh <html> Text")]
    assert "a.txt (empty)" in caplog.text
    with pytest.raises(BadInput, match="the source is empty"):
        read(tmp_path / "a.txt")


# Damage


def parquet(path: Path, rows: int = 4000, **more: object) -> list[tuple[str, str]]:
    """A Parquet file of ten row groups; returns its ids and texts."""
    documents = [(str(n), f"{n} " + "äbc " * (n % 50)) for n in range(rows)]
    table = pa.table({"id": [id for id, _ in documents], "text": [text for _, text in documents]})
    pq.write_table(table, path, row_group_size=rows // 10, compression="snappy", **more)
    return documents


def flip(path: Path, at: int, count: int = 16) -> None:
    data = bytearray(path.read_bytes())
    data[at : at + count] = bytes(byte ^ 0xA5 for byte in data[at : at + count])
    path.write_bytes(data)


def test_the_intact_row_groups_of_a_damaged_parquet_file_are_read(tmp_path: Path) -> None:
    documents = parquet(tmp_path / "a.parquet", write_page_checksum=True)
    group = pq.ParquetFile(tmp_path / "a.parquet").metadata.row_group(3)
    flip(tmp_path / "a.parquet", group.column(1).dictionary_page_offset + 100)
    with pytest.raises(BadInput, match=r"a.parquet cannot be read at row 1201 on .*--allow_damaged_files"):
        read(tmp_path)
    records = read(tmp_path, allow=True)
    assert rejected(records) == [(row, "damaged") for row in range(1201, 1601)]
    found = [(record.id, record.text) for record in records if isinstance(record, Document)]
    assert found == documents[:1200] + documents[1600:]


CUT: list[tuple[str, Callable[[bytes], bytes]]] = [
    ("a.jsonl.gz", lambda data: gzip.compress(data)[:-9]),
    ("a.jsonl.gz", lambda data: gzip.compress(data) + b"\x1f\x8bgarbage"),
    ("a.jsonl.zst", lambda data: zst(data)[:-9]),
    ("a.jsonl.bz2", lambda data: bz2.compress(data) + b"BZh9" + b"x" * 50),
    ("a.jsonl.bz2", lambda data: bz2.compress(data) + bz2.compress(data)[:-9]),
    ("a.jsonl.xz", lambda data: lzma.compress(data) + lzma.compress(data)[1:]),
    ("a.jsonl.xz", lambda data: lzma.compress(data) + lzma.compress(data)[:-30]),
    ("a.json", lambda data: b"[" + b",".join(data.split(b"\n")[:-1])),
    ("a.json", lambda data: b"[" + b",".join(data.split(b"\n")[:-1]) + b', {"text": "offen]'),
]


@pytest.mark.parametrize(("name", "damage"), CUT, ids=[f"{name}-{n}" for n, (name, _) in enumerate(CUT)])
def test_the_unread_rest_of_a_file_is_never_silent(tmp_path: Path, name: str, damage: Callable[[bytes], bytes]) -> None:
    data = lines(*({"id": str(n), "text": os.urandom(20).hex()} for n in range(5000)))
    (tmp_path / name).write_bytes(damage(data))
    with pytest.raises(BadInput, match=rf"{name} cannot be read from line \d+ on .*--allow_damaged_files"):
        read(tmp_path)
    records = read(tmp_path, allow=True)
    assert [kind for _, kind in rejected(records)] == ["cut short"]
    ids = [record.id for record in records if isinstance(record, Document)]
    assert len(ids) > 2500
    assert ids[:5000] == [str(n) for n in range(len(ids[:5000]))]


def test_an_arrow_file_cut_at_the_edge_of_a_batch(tmp_path: Path) -> None:
    """Its stream format needs no end mark, so pyarrow does not say that batches are missing."""
    table = pa.Table.from_pylist([{"id": str(n), "text": "x" * 1000} for n in range(100)])
    with pa.ipc.new_stream(str(tmp_path / "whole.arrow"), table.schema) as file:
        for start in range(0, 100, 50):
            file.write_table(table.slice(start, 50))
    data = (tmp_path / "whole.arrow").read_bytes()
    (tmp_path / "a.arrow").write_bytes(data[:-8])
    assert len(pa.ipc.open_stream(data[:-8]).read_all()) == 100
    assert len(pairs(read(tmp_path / "whole.arrow"))) == 100
    with pytest.raises(BadInput, match=r"cannot be read from line 101 on .the mark at the end of the stream"):
        read(tmp_path / "a.arrow")


def encrypted(path: Path) -> None:
    import pyarrow.parquet.encryption as encryption

    class Kms(encryption.KmsClient):
        def wrap_key(self, key: bytes, name: str) -> bytes:
            return key.hex().encode()

        def unwrap_key(self, key: bytes, name: str) -> bytes:
            return bytes.fromhex(key.decode())

    factory = encryption.CryptoFactory(lambda _: Kms())
    settings = encryption.EncryptionConfiguration("k", column_keys={"k": ["text"]}, plaintext_footer=True)
    properties = factory.file_encryption_properties(encryption.KmsConnectionConfig(), settings)
    table = pa.table({"id": ["1"], "text": ["geheim"]})
    with pq.ParquetWriter(path, table.schema, encryption_properties=properties) as writer:
        writer.write_table(table)


def long_window(path: Path) -> None:
    if shutil.which("zstd") is None:
        pytest.skip("there is no zstd program")
    command = ["zstd", "--ultra", "--long=31", "-q", "-o", str(path)]
    subprocess.run(command, input=lines(ONE) * 1000, check=True)


NOT_READABLE: list[tuple[str, bytes | Callable[[Path], None], str]] = [
    ("a.jsonl.gz", JSONL, "is not compressed as its name says: it begins with b'"),
    ("a.jsonl.gz", zst(JSONL), "is not compressed as its name says: compressed; its name must end in .zst"),
    ("a.jsonl", gzip.compress(JSONL), "is not text: compressed; its name must end in .gz"),
    ("a.jsonl", "Straße".encode("utf-16"), "is not text: UTF-16 text; `iconv"),
    ("a.jsonl", JSONL.decode().encode("utf-16-le"), "is not text: UTF-16 text; `iconv -f UTF-16LE"),
    ("a.csv", CSV.decode().encode("utf-16-be"), "is not text: UTF-16 text; `iconv -f UTF-16BE"),
    ("a.txt", "Straße".encode("utf-16"), "is not text: UTF-16 text; `iconv -f UTF-16 "),
    ("a.txt", "Die Straße".encode("utf-16-le"), "is not text: UTF-16 text; `iconv -f UTF-16LE"),
    ("a.txt", b"version https://git-lfs.github.com/spec/v1\noid", "a pointer of Git LFS; `git lfs pull`"),
    ("a.txt", gzip.compress(JSONL), "is not text: compressed; its name must end in .gz"),
    ("a.csv", b"PK\x03\x04zip", "is not text: a zip archive"),
    ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid", "a pointer of Git LFS; `git lfs pull`"),
    ("a.parquet", JSONL, "is not a Parquet file"),
    ("a.arrow", JSONL, "is not an Arrow file"),
    ("a.jsonl.xz", lzma.compress(JSONL)[:40], "nothing of it can be read"),
    ("a.parquet", encrypted, "cannot be read at row 1 on"),
    ("a.jsonl.zst", long_window, "nothing of it can be read"),
]


@pytest.mark.parametrize(("name", "content", "said"), NOT_READABLE, ids=[said[-40:] for *_, said in NOT_READABLE])
def test_what_cannot_be_read_shows_before_any_work(
    tmp_path: Path, name: str, content: bytes | Callable[[Path], None], said: str
) -> None:
    (tmp_path / "whole.jsonl").write_bytes(JSONL)
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    else:
        content(tmp_path / name)
    with pytest.raises(BadInput, match=f"{name}.* ?") as raised:
        open_sources([str(tmp_path)], Fields())
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_files_that_cannot_be_read_are_told_together(tmp_path: Path) -> None:
    for number in range(5):
        (tmp_path / f"{number}.parquet").write_bytes(b"PAR1")
    with pytest.raises(BadInput, match=r"0.parquet is not.*1.parquet is not.*2.parquet.*; and 2 more files$"):
        open_sources([str(tmp_path)], Fields())


# Ids and guards


def test_ids_that_restart_in_each_file_are_refused_before_any_work(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_bytes(lines(*({"id": n, "text": f"{name} {n}"} for n in range(100))))
    pq.write_table(pa.table({"id": range(100), "text": ["x"] * 100}), tmp_path / "c.parquet")
    with pytest.raises(BadInput, match=r"ids repeat in 2 of 3 files: .*b.jsonl has id 0, as has .*--id_field ''"):
        open_sources([str(tmp_path)], Fields(), max_repeated_ids=0.001)
    open_sources([str(tmp_path)], Fields(id=""), max_repeated_ids=0.001)
    open_sources([str(tmp_path)], Fields(), max_repeated_ids=0.9)
    (tmp_path / "b.jsonl").write_bytes(lines(*({"id": "same", "text": f"{n}"} for n in range(100))))
    (tmp_path / "c.parquet").unlink()
    with pytest.raises(BadInput, match=r"b.jsonl has id same, as has itself"):
        open_sources([str(tmp_path)], Fields(), max_repeated_ids=0.001)


def test_a_few_ids_that_come_again_are_left_to_the_ledger(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(*({"id": n, "text": "lang " * 10} for n in range(5000))))
    (tmp_path / "b.jsonl").write_bytes(lines({"id": 0, "text": "noch einmal"}))
    open_sources([str(tmp_path)], Fields(), max_repeated_ids=0.001)


def test_all_programs_have_one_guard(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(ONE) + b'{"text": "\xfc"}\n{"text": "\xfc"}\n' + lines(TWO))
    sources = open_sources([str(tmp_path)], Fields())
    guard = RejectGuard(0.5, False)
    assert [document.text for document in read_documents(sources, Fields(), guard)] == [text for _, text in BOTH]
    assert (guard.lines, guard.rejects) == (4, 2)
    with pytest.raises(BadInput, match=r"2 of 4 lines rejected.*2 bad UTF-8.*a.jsonl line 2.*iconv -f LATIN1"):
        list(read_documents(sources, Fields(), RejectGuard(0.4, False)))
