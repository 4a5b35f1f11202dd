"""Text out of Debian packages: pages become documents in the order of their paths, the same bytes each time."""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
import subprocess
from pathlib import Path

import pytest

from lit_gpt.cli import BadInput
from scripts import collect_debian_text

pytestmark = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="dpkg-deb is not on this machine")

GERMAN = (
    "Die Katze sitzt auf der Mauer und sieht den Vögeln zu, die über den Garten fliegen. Am Abend geht sie ins Haus, "
    "weil es dort warm ist und weil sie weiß, dass in der Küche etwas für sie steht."
)
ENGLISH = (
    "The cat sits on the wall and watches the birds that fly over the garden. In the evening it goes into the house, "
    "because it is warm in there and because it knows that there is something for it in the kitchen."
)
FRENCH = (
    "Le chat est assis sur le mur et regarde les oiseaux qui volent au-dessus du jardin. Le soir, il rentre dans la "
    "maison, parce qu'il y fait chaud et parce qu'il sait qu'il y a quelque chose pour lui dans la cuisine."
)
PAGE = (
    '<html><head><meta charset="{}"><title>x</title></head><body><nav><a href="y">Weiter</a></nav>'
    "<h1>Titel</h1><p>{}</p><p>Zweiter\n Absatz</p></body></html>"
)


def package(folder: Path, name: str, files: dict[str, bytes], version: str = "1:2-3") -> Path:
    """NAME.deb with these files."""
    tree = folder / f"{name}-tree"
    control = f"Package: {name}\nVersion: {version}\nArchitecture: all\nMaintainer: a <a@example.org>\nDescription: x\n"
    for path, content in {"DEBIAN/control": control.encode(), **files}.items():
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        (tree / path).write_bytes(content)
    subprocess.run(["dpkg-deb", "--build", tree, folder / f"{name}.deb"], check=True, capture_output=True)
    return folder / f"{name}.deb"


def collected(destination: Path, *packages: Path) -> dict[str, bytes]:
    words = ["--destination_path", str(destination), "--workers", "2", "--source", *map(str, packages)]
    collect_debian_text.main(words)
    paths = [destination / "MANIFEST.json", *sorted((destination / "documents").iterdir())]
    return {path.name: path.read_bytes() for path in paths}


def test_pages_become_documents_with_versions_and_digests(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("resiliparse")
    first = package(tmp_path, "zwei", {
        "usr/share/doc/b.html": PAGE.format("iso-8859-1", GERMAN).encode("latin-1"),
        "usr/share/doc/a.html.gz": gzip.compress(PAGE.format("utf-8", ENGLISH).encode()),
        "usr/share/doc/c.html.fr": PAGE.format("utf-8", FRENCH).encode(),
        "usr/share/doc/short.html": PAGE.format("utf-8", "Kurz.").encode(),
        "usr/share/doc/README.gz": gzip.compress(GERMAN.encode()),
        "usr/share/doc/cut.html.gz": gzip.compress(GERMAN.encode())[:40],
    })  # fmt: skip
    second = package(tmp_path, "eins", {"d.htm": PAGE.format("utf-8", GERMAN).encode()}, version="7")
    found = collected(tmp_path / "raw", first, second)
    assert sorted(found) == ["MANIFEST.json", "eins.jsonl.gz", "zwei.jsonl.gz"]
    assert capsys.readouterr().out.startswith("de: 2 documents, ")
    documents = [json.loads(line) for line in gzip.decompress(found["zwei.jsonl.gz"]).splitlines()]
    rest = {"source": "zwei=1:2-3"}
    assert documents == [
        {
            "id": "zwei/usr/share/doc/a.html.gz",
            "text": f"Titel\n\n{ENGLISH}\n\nZweiter Absatz",
            **rest,
            "language": "en",
        },
        {"id": "zwei/usr/share/doc/b.html", "text": f"Titel\n\n{GERMAN}\n\nZweiter Absatz", **rest, "language": "de"},
    ]
    manifest = json.loads(found["MANIFEST.json"])
    eins, zwei = manifest["packages"]
    assert (eins["package"], eins["version"], zwei["version"]) == ("eins", "7", "1:2-3")
    assert zwei["archive_sha256"] == hashlib.sha256(first.read_bytes()).hexdigest()
    assert zwei["file_sha256"] == hashlib.sha256(found["zwei.jsonl.gz"]).hexdigest()
    length = len(f"Titel\n\n{GERMAN}\n\nZweiter Absatz")
    assert eins["languages"] == {"de": {"documents": 1, "characters": length}}

    assert collected(tmp_path / "again", second, first) == found
    written = (tmp_path / "again/documents/zwei.jsonl.gz").stat().st_mtime_ns
    (tmp_path / "again/documents/eins.jsonl.gz").write_bytes(b"cut off")
    (tmp_path / "again/MANIFEST.json").unlink()
    assert collected(tmp_path / "again", first, second) == found, "a rerun repairs what is not what was written"
    assert (tmp_path / "again/documents/zwei.jsonl.gz").stat().st_mtime_ns == written, "and keeps the rest"
    assert sorted(collected(tmp_path / "raw", second)) == ["MANIFEST.json", "eins.jsonl.gz"]


@pytest.mark.skipif(shutil.which("mandoc") is None, reason="mandoc is not on this machine")
def test_manual_pages_have_a_paragraph_a_line(tmp_path: Path) -> None:
    pytest.importorskip("resiliparse")
    page = f".TH KATZE 1\n.SH BESCHREIBUNG\n{GERMAN.replace('. ', f'.{chr(10)}')}\n".encode()
    found = collected(tmp_path / "raw", package(tmp_path, "man", {
        "usr/share/man/de/man1/katze.1.gz": gzip.compress(page),
        "usr/share/man/de/man1/kater.1.gz": gzip.compress(b".so man1/katze.1\n"),
    }))  # fmt: skip
    (document,) = [json.loads(line) for line in gzip.decompress(found["man.jsonl.gz"]).splitlines()]
    assert document["id"] == "man/usr/share/man/de/man1/katze.1.gz"
    assert GERMAN in document["text"].splitlines()
    assert not any(mark in document["text"] for mark in (".SH", "<p", "\x1b", "\b"))


def test_a_package_that_is_none_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("resiliparse")
    (tmp_path / "a.deb").write_bytes(b"no archive")
    with pytest.raises(BadInput, match=r"dpkg-deb --show: .*a\.deb"):
        collected(tmp_path / "raw", tmp_path / "a.deb")
    with pytest.raises(BadInput, match=r"--source .*b\.deb: there is no such file"):
        collected(tmp_path / "raw", tmp_path / "b.deb")
    with pytest.raises(BadInput, match="--languages deutsch: give two letters"):
        collect_debian_text.main(["--destination_path", str(tmp_path / "raw"), "--languages", "deutsch"])
    same = package(tmp_path, "eins", {})
    with pytest.raises(BadInput, match="named twice: eins"):
        collected(tmp_path / "raw", same, same)
