"""The program: what it writes, what it answers, kills, full disks, damaged and odd inputs."""

from __future__ import annotations

import errno
import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lit_gpt import files
from lit_gpt.cli import BadInput
from lit_gpt.corpus.corpus import Corpus
from lit_gpt.corpus.paragraph_fates import SettleStep
from lit_gpt.corpus.verify import verify
from lit_gpt.corpus.why import explain
from tests.corpus.conftest import Build, built, made_up, write_documents
from tests.corpus.test_paragraph_dedup import bytes_of, documents_of, removals_of
from tests.support.programs import ROOT, environment, run_program

PROGRAM = ROOT / "scripts/build_corpus.py"
KILLED = ROOT / "tests/corpus/killed_build.py"
SETTINGS: dict[str, Any] = {
    "stages": ["paragraph_dedup", "pii", "repetition"], "part_bytes": 4000, "max_duplicate_line_fraction": 0.5,
    "min_kept_words": 5,
}  # fmt: skip
FLAGS = [
    word
    for name, value in SETTINGS.items()
    for word in (f"--{name}", *(value if isinstance(value, list) else [str(value)]))
]


def sources(folder: Path, count: int = 3) -> Path:
    folder.mkdir()
    for number in range(count):
        documents = made_up(25, number)
        documents[3]["text"] += f"\nSchreiben Sie an mail{number}@firma.de oder 8.8.4.4, nicht an 10.0.0.1"
        for document in documents:
            document["id"] = f"{number}-{document['id']}"
        write_documents(folder / f"{number}.jsonl", documents)
    return folder


class Whole(NamedTuple):
    source: Path
    corpus: Path
    stats: dict[str, Any]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """Sources, and a corpus of them that was built undisturbed. Tests change copies only."""
    folder = tmp_path_factory.mktemp("whole")
    source = sources(folder / "in")
    return Whole(source, folder / "out", built(source, folder / "out", **SETTINGS))


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return run_program([sys.executable, PROGRAM, *arguments])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["documents/zz.jsonl", "removed/00000.parquet", "ids/00000.npy"])
def test_what_lay_there_before_is_not_of_the_corpus(tmp_path: Path, name: str) -> None:
    stray = tmp_path / "out" / name
    stray.parent.mkdir(parents=True)
    stray.write_text('{"id": "foreign", "text": "Ein Text, den niemand geprüft hat."}')
    with pytest.raises(BadInput, match=f"out holds {name}, which is not of this build: choose another folder"):
        built(sources(tmp_path / "in", 1), tmp_path / "out", **SETTINGS)
    assert not (tmp_path / "out" / "build").exists()


@pytest.mark.parametrize("name", ["removed/00000.parquet", "ids/00000.npy"])
def test_why_tells_of_a_damaged_file(whole: Whole, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "out"
    shutil.copytree(whole.corpus, folder)
    known, _ = documents_of(Corpus(folder))[0]
    damaged = folder / name
    damaged.write_bytes(damaged.read_bytes()[:60])
    with pytest.raises(BadInput, match=f"{name} cannot be read .*verify"):
        explain(Corpus(folder), known)


def test_the_program_writes_a_corpus_that_verify_and_why_read(tmp_path: Path) -> None:
    source, out = sources(tmp_path / "in"), tmp_path / "out"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("min_kept_words: 5\nstages: [paragraph_dedup, pii, repetition]\n")
    rest = ["--part_bytes", "4000", "--max_duplicate_line_fraction", "0.5"]
    done = run("--config", recipe, "--source", source, "--destination_path", out, "--workers", "1", *rest)
    assert done.returncode == 0, done.stderr
    assert "75 lines in, 75 documents; rejected: none" in done.stdout
    assert "pii: email: 3 masks" in done.stdout
    page = (out / "report.html").read_text(encoding="utf-8")
    assert all(word in page for word in ("repeated_paragraph", "Most repeated paragraphs", "duplicate_line_fraction"))
    assert "mail1@firma.de" not in page.split("Removed text")[0]
    checked = run("verify", out)
    assert (checked.returncode, checked.stdout.endswith("checked; whole\n")) == (0, True), checked.stdout
    (answer,) = map(json.loads, run("why", "1-d3", "--corpus", out, "--json").stdout.splitlines())
    masks = [(row["rule"], row["text"], row["replacement"]) for row in answer["rows"] if row["stage"] == "pii"]
    assert masks == [("email", "mail1@firma.de", "email@example.com"), ("ip_address", "8.8.4.4", "192.0.2.1")]
    assert answer["kept"]
    again = run("--config", recipe, "--source", source, "--destination_path", out, "--workers", "1", *rest)
    assert "already holds this corpus, finished" in again.stderr
    other = run("--source", source, "--destination_path", out, "--stages", "pii")
    assert other.returncode == 2
    assert "holds a finished corpus made with other" in other.stderr
    unknown = run("why", "nobody", "--corpus", out)
    assert (unknown.returncode, "no document 'nobody' was read" in unknown.stderr) == (2, True)


def test_fields_ids_and_sources_are_kept(build_corpus: Build, tmp_path: Path) -> None:
    documents = [
        {"raw_content": "ein Text", "digest": "sha1:A", "url": "http://a", "big": 1 << 70, "id": 7, "more": {"x": 1}},
        {"raw_content": "noch ein Text", "digest": "sha1:B", "source": "eigene Quelle", "odd": "\ud800"},
    ]  # fmt: skip
    path = tmp_path / "in.json.gz"
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(document) + "\n" for document in documents)
    build_corpus(path, tmp_path / "out", text_field="raw_content", id_field="digest", stages=[])
    with pa.CompressedInputStream(str(tmp_path / "out/documents/00000.jsonl.zst"), "zstd") as stream:
        one, two = map(json.loads, stream.read().splitlines())
    assert one == {
        "id": "sha1:A", "text": "ein Text", "source": "in.json.gz", "url": "http://a", "big": 1 << 70,
        "source_id": 7, "more": {"x": 1},
    }  # fmt: skip
    assert two == {"id": "sha1:B", "text": "noch ein Text", "source": "eigene Quelle", "odd": "\ud800"}


def test_a_table_keeps_its_columns(build_corpus: Build, tmp_path: Path) -> None:
    """Numbers, times, bytes and lists; a row of bad UTF-8 in another column costs nothing."""
    table = pa.table(
        {
            "content": ["eins", "zwei"], "id": [1, 2], "score": [0.5, None], "tags": [["a"], []],
            "raw": pa.array([b"\xff", b"b"], pa.binary()), "day": pa.array([0, 1], pa.date32()),
        }
    )  # fmt: skip
    pq.write_table(table, tmp_path / "in.parquet")
    build_corpus(tmp_path / "in.parquet", tmp_path / "out", stages=[])
    with pa.CompressedInputStream(str(tmp_path / "out/documents/00000.jsonl.zst"), "zstd") as stream:
        one, two = map(json.loads, stream.read().splitlines())
    assert one == {
        "id": "1", "text": "eins", "source": "in.parquet", "score": 0.5, "tags": ["a"], "raw": "\ufffd",
        "day": "1970-01-01",
    }  # fmt: skip
    assert two["score"] is None


def test_masks_and_cuts_name_bytes_of_the_source(build_corpus: Build, tmp_path: Path) -> None:
    """Two addresses in a paragraph with umlauts, masked before and after paragraphs are cut."""
    repeat = "dieser Absatz steht zweimal da"
    text = f"{repeat}\nÜber info@firma.de und 8.8.8.8 sowie 1.2.3.4.5 und 8.8.8.8: ende\n{repeat}\nnoch ein Absatz hier"
    source = write_documents(tmp_path / "in.jsonl", [{"id": "x", "text": text}])
    for stages in (["pii", "paragraph_dedup"], ["paragraph_dedup", "pii"]):
        out = tmp_path / "-".join(stages)
        build_corpus(source, out, stages=stages, min_kept_words=0, min_kept_fraction=0)
        corpus = Corpus(out)
        masked = "Über email@example.com und 192.0.2.1 sowie 1.2.3.4.5 und 192.0.2.1: ende"
        assert [kept for _, kept in documents_of(corpus)] == [f"{repeat}\n{masked}\nnoch ein Absatz hier"]
        (found,) = explain(corpus, "x")
        begin = len(f"{repeat}\nÜber ".encode())
        rows = [(row["paragraph"], row["start_byte"], row["length_bytes"], row["rule"]) for row in found.rows]
        line = text.split("\n")[1]
        ips = [begin + len(line[5:at].encode()) for at in (line.index("8.8.8.8"), line.rindex("8.8.8.8"))]
        assert [row for row in rows if row[3] == "ip_address"] == [(1, at, 7, "ip_address") for at in ips]
        assert (2, len("\n".join(text.split("\n")[:2]).encode()) + 1, len(repeat), "repeated_paragraph") in rows
        assert verify(corpus).faults == []


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda out: (out / "documents/00000.jsonl.zst").unlink(), "is missing"),
        (lambda out: (out / "removed/00001.parquet").write_bytes(b"x"), "is not the file that the manifest names"),
        (lambda out: (out / "documents/00009.jsonl.zst").write_bytes(b""), "is not in the manifest"),
    ],
)
def test_verify_names_what_was_changed(whole: Whole, tmp_path: Path, damage: Any, said: str) -> None:
    shutil.copytree(whole.corpus, tmp_path / "out")
    damage(tmp_path / "out")
    assert [fault for fault in verify(Corpus(tmp_path / "out")).faults if said in fault]


def test_verify_compares_every_document_with_its_source(
    build_corpus: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A letter of a source is another: the hashes are those of the manifest, the text is not."""
    source = sources(tmp_path / "in")
    build_corpus(source, tmp_path / "out", **SETTINGS)
    path = source / "1.jsonl"
    path.write_text(path.read_text().replace("Wald", "Wolf"))
    (fault, *_) = verify(Corpus(tmp_path / "out")).faults
    assert "is not its source less what the ledger names" in fault


# Kills and full disks


@pytest.mark.slow
def test_a_killed_build_goes_on_to_the_same_bytes(whole: Whole, tmp_path: Path) -> None:
    """Killed before the 7th file, then before the 11th of the next start, and so on, until a start comes to its end."""
    source = whole.source
    command = ["--source", source, "--destination_path", tmp_path / "out", "--workers", "1", *FLAGS]
    codes = []
    for left in (7, 11, 8, 6, 1_000):
        done = run_program([sys.executable, KILLED, left, *command])
        codes.append(done.returncode)
        assert done.returncode in (0, -signal.SIGKILL), done.stderr
    assert codes.count(-signal.SIGKILL) >= 3
    assert bytes_of(tmp_path / "out") == bytes_of(whole.corpus)
    assert not list((tmp_path / "out").glob("build*"))


READY = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import runpy, lit_gpt.corpus.corpus_builder
print(flush=True)
sys.argv[0] = {str(PROGRAM)!r}
runpy.run_path({str(PROGRAM)!r}, run_name="__main__")
"""


@pytest.mark.long
@pytest.mark.parametrize("workers", [1, 3])
def test_the_same_bytes_after_sixty_kills_at_random_moments(build_corpus: Build, tmp_path: Path, workers: int) -> None:
    choice = random.Random(workers)
    source = sources(tmp_path / "in", 6)
    build_corpus(source, tmp_path / "whole", **SETTINGS)
    whole = bytes_of(tmp_path / "whole")
    kills = finished = 0
    duration_s = 5.0
    while kills < 60:
        out = tmp_path / str(finished)
        command = ["--source", source, "--destination_path", out, "--workers", workers, *FLAGS]
        process = subprocess.Popen(
            [sys.executable, "-c", READY, *map(str, command)], env=environment(), stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "\n"
        began_s = time.monotonic()
        try:
            _, errors = process.communicate(timeout=choice.uniform(0, 1.1 * duration_s))
        except subprocess.TimeoutExpired:
            (os.kill if choice.random() < 0.5 else os.killpg)(process.pid, signal.SIGKILL)
            process.communicate()
            kills += 1
            continue
        assert process.returncode == 0, errors
        duration_s = min(duration_s, time.monotonic() - began_s)
        assert bytes_of(out) == whole
        finished += 1
    build_corpus(source, tmp_path / str(finished), **SETTINGS)
    assert bytes_of(tmp_path / str(finished)) == whole


def test_a_full_disk_is_told_and_the_build_goes_on(
    build_corpus: Build, whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = files.fsync
    for allowed in (3, 9):
        left = allowed

        def full(path: Path) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            real(path)

        monkeypatch.setattr(files, "fsync", full)
        with pytest.raises(OSError, match="make room, and give the same command again") as caught:
            build_corpus(whole.source, tmp_path / "out", **SETTINGS)
        assert caught.value.errno == errno.ENOSPC
        assert caught.value.filename
    monkeypatch.setattr(files, "fsync", real)
    build_corpus(whole.source, tmp_path / "out", **SETTINGS)
    assert bytes_of(tmp_path / "out") == bytes_of(whole.corpus)


# Inputs


def test_bad_lines_are_rejects_and_a_damaged_file_stops_the_build(build_corpus: Build, tmp_path: Path) -> None:
    good = [json.dumps(document) for document in made_up(30)]
    path = tmp_path / "in.jsonl"
    path.write_text("\n".join([*good[:10], "{no json", '{"id": "n"}', *good[10:]]) + "\n")
    with pytest.raises(BadInput, match="2 of 32 lines rejected"):
        build_corpus(path, tmp_path / "out")
    stats = build_corpus(path, tmp_path / "out", max_reject_fraction=0.1)
    assert (stats["lines"], stats["documents"], stats["rejects"]) == (32, 30, {"bad JSON": 1, "no text": 1})
    rejects = [json.loads(line) for line in (tmp_path / "out/rejects.jsonl").read_text().splitlines()]
    assert [(reject["file"], reject["line"]) for reject in rejects] == [("in.jsonl", 11), ("in.jsonl", 12)]
    whole = gzip.compress("\n".join(good).encode())
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadInput, match=r"cut\.jsonl\.gz.*--allow_damaged_files"):
        build_corpus(tmp_path / "cut.jsonl.gz", tmp_path / "other")


def test_a_source_that_changes_between_the_passes_ends_the_build(
    build_corpus: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the same size, after paragraphs of it were counted: the ledger would name others."""
    path = write_documents(tmp_path / "in.jsonl", made_up(30))
    decide = SettleStep.run

    def changing(*arguments: Any) -> Any:
        path.write_text(path.read_text().replace("Wald", "Wolf"))
        os.utime(path, ns=(0, 0))
        return decide(*arguments)

    monkeypatch.setattr(SettleStep, "run", changing)
    with pytest.raises(BadInput, match=r"in\.jsonl changed during the build"):
        build_corpus(path, tmp_path / "out")


def test_same_ids_in_two_files_are_both_explained(build_corpus: Build, tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        write_documents(tmp_path / name, [{"id": "same", "text": f"aus {name}, aber beide heißen gleich"}])
    build_corpus(tmp_path, tmp_path / "out")
    assert [(one.source_file, one.line) for one in explain(Corpus(tmp_path / "out"), "same")] == [
        ("a.jsonl", 1), ("b.jsonl", 1),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"stages": ["dedup"]}, "dedup is none of quality_signals"),
        ({"stages": ["pii", "pii"]}, "pii stands there twice"),
        ({"stages": ["token_to_word"]}, "needs --tokenizer_path"),
        ({"max_top_ngram_fractions": [0.1]}, "must be 3 numbers"),
        ({"min_kept_fraction": 2.0}, "must be from 0 to 1"),
        ({"part_bytes": 0}, "must be at least 1"),
    ],
)
def test_bad_settings_are_refused(build_corpus: Build, tmp_path: Path, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        build_corpus(tmp_path, tmp_path / "out", **settings)


def test_ledger_and_documents_together_are_all_documents(whole: Whole) -> None:
    corpus = Corpus(whole.corpus)
    gone = {id for id, paragraph, *_ in removals_of(corpus) if paragraph is None}
    kept = {id for id, _ in documents_of(corpus)}
    assert gone
    assert not gone & kept
    assert len(gone) + len(kept) == whole.stats["documents"] == 75
