"""The demo's text: the handbook's pages become documents; a source that is not available is named, never ignored."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import fsspec
import pyarrow
import pytest
from pyarrow import parquet

from scripts import fetch_german_text

PROGRAM = Path(__file__).resolve().parents[2] / "scripts" / "fetch_german_text.py"

PAGE = """<html><head><title>nicht dies</title></head><body>
<p id="title"><a href="x"><img src="y" /></a>auch nicht</p>
<div class="section"><h2 class="title"><a id="z"></a>6.9. Ein Titel</h2>
<div class="toc"><ul><li>6.9.1. Inhalt</li></ul></div>
<div class="para">Der <code>Befehl</code> ist\n\t\tkurz<br>und   gut &amp; alt.<ul><li>Ein Punkt</li></ul></div>
<pre>rm -r der die das</pre><div class="url">→ <a href="x">https://debian.example</a></div>
<div class="para">The rest of this page is not translated.</div></div>
<h3>6.9.1. Leer</h3><div class="para">This is the end of it.</div>
<ul class="docnav"><li>Zurück</li></ul></body></html>"""


def test_handbook_page_becomes_one_document_a_section_in_german(tmp_path: Path) -> None:
    (tmp_path / "seite.html").write_text(PAGE, encoding="utf-8")
    documents = list(fetch_german_text.handbook_documents(tmp_path, "handbook"))
    text = "6.9. Ein Titel\nDer Befehl ist kurz und gut & alt.\nEin Punkt"
    assert documents == [fetch_german_text.Document("debian-handbook-de/seite.html#0", text, "handbook")]


def test_grammar_gives_the_same_sentences_for_a_seed() -> None:
    first, second = fetch_german_text.from_grammar(2), fetch_german_text.from_grammar(2)
    documents = list(first)
    assert documents == list(second)
    assert [document.id for document in documents] == ["generated-3407#0", "generated-3407#1"]
    assert documents != list(fetch_german_text.from_grammar(2, seed=1))
    assert all(sentence[0].isupper() for sentence in documents[0].text.replace("\n", " ").split(". "))


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_first_records_of_every_format(tmp_path: Path, name: str) -> None:
    records = [
        {"id": "x", "text": "eins"},
        {"id": "y", "text": ""},
        {"id": None, "text": "drei"},
        {"id": "z", "text": "."},
    ]
    lines = "".join(json.dumps(record) + "\n" for record in records).encode()
    (tmp_path / "README.md").write_text("no data")
    path = tmp_path / name
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(lines))
    elif name.endswith(".zst"):
        with pyarrow.CompressedOutputStream(str(path), "zstd") as stream:
            stream.write(lines)
    elif name.endswith(".parquet"):
        parquet.write_table(pyarrow.Table.from_pylist(records), path)
    else:
        path.write_bytes(lines)
    found = list(fetch_german_text.first_records(fsspec.filesystem("file"), str(tmp_path), 2))
    assert [(document.id, document.text) for document in found] == [("x", "eins"), (f"{name}#1", "drei")]


def run(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The program on a machine without apt (an empty PATH) and without the hub (offline)."""
    return subprocess.run(
        [sys.executable, str(PROGRAM), "--destination_path", str(tmp_path / "text.jsonl"), *arguments],
        env={**os.environ, "PATH": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(PROGRAM.parents[2])},
        capture_output=True,
        text=True,
        check=False,
    )


def test_falls_back_to_the_grammar_and_says_why(tmp_path: Path) -> None:
    done = run(tmp_path, "--max_documents", "3")
    assert done.returncode == 0, done.stderr
    assert "generated taken: 3 documents" in done.stdout
    assert "handbook not taken: apt-get and dpkg-deb are not on this machine" in done.stdout
    assert "hub not taken: LSX-UniWue/LLaMmlein-Dataset: OfflineModeIsEnabled" in done.stdout
    records = [json.loads(line) for line in (tmp_path / "text.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [sorted(record) for record in records] == [["id", "source", "text"]] * 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--source", "handbook"], "apt-get and dpkg-deb are not on this machine"),
        (["--max_documents", "0"], "must be at least 1"),
        (["--source", "bible"], "invalid choice: 'bible'"),
    ],
)
def test_refusals_are_one_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    done = run(tmp_path, *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
