"""Paragraph deduplication beside a brute-force one, on made-up and on real text; the same bytes for any workers."""

from __future__ import annotations

import functools
import gzip
import json
import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lit_gpt.corpus import paragraph_groups
from lit_gpt.corpus.corpus import Corpus
from lit_gpt.corpus.paragraph_fates import LEFT_OVER, REPEATED, decide
from lit_gpt.corpus.paragraph_keys import BLANK
from lit_gpt.corpus.settings import DedupSettings
from lit_gpt.corpus.verify import _ledger, _output, verify
from tests.corpus.brute_force import Removal, deduplicated
from tests.corpus.conftest import Build, made_up, write_documents
from tests.support.programs import ROOT

HANDBOOK = ROOT.parent / "shared/data/debian-handbook-de.jsonl.gz"
MANUALS = Path("/usr/share/man/de")


def documents_of(corpus: Corpus) -> list[tuple[str, str]]:
    return [(document.id, document.text) for part in corpus.parts for document in _output(corpus, part)]


def removals_of(corpus: Corpus) -> list[Removal]:
    return [
        (row["document_id"], row["paragraph"], row["rule"], row["duplicate_of_document"], row["duplicate_of_paragraph"])
        for part in corpus.parts
        for _, rows in _ledger(corpus, part)
        for row in rows
    ]


def bytes_of(folder: Path) -> dict[str, bytes]:
    """All files of a corpus but the page, which tells how fast it was."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "report.html"
    }


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("partition_keys", [1 << 21, 100])
def test_removes_what_brute_force_removes(
    build_corpus: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int, partition_keys: int
) -> None:
    """Three sources in as many parts; a partition for all keys, and several."""
    monkeypatch.setattr(paragraph_groups, "PARTITION_KEYS", partition_keys)
    documents = made_up(150, seed)
    for number, name in enumerate(("a.jsonl", "b.jsonl.gz", "c.jsonl")):
        write_documents(tmp_path / name, documents[number * 50 : (number + 1) * 50])
    limits = {"min_words": 4, "min_kept_fraction": 0.2, "min_kept_words": 5}
    build_corpus(tmp_path, tmp_path / "out", part_bytes=1, **limits)
    left, removals = deduplicated(documents, **limits)  # type: ignore[arg-type]
    corpus = Corpus(tmp_path / "out")
    assert len(corpus.parts) == 3
    assert documents_of(corpus) == left
    assert removals_of(corpus) == removals
    assert {rule for _, _, rule, _, _ in removals} == {
        "repeated_paragraph", "left_over", "min_kept_fraction", "min_kept_words",
    }  # fmt: skip
    assert verify(corpus).faults == []


def manual_pages() -> list[dict[str, Any]]:
    """Debian's German manual pages as they are stored: a paragraph a line of troff, with many true repeats."""
    pages = sorted(MANUALS.glob("man*/*.gz"))
    return [{"id": path.name, "text": gzip.decompress(path.read_bytes()).decode("utf-8", "replace")} for path in pages]


@functools.cache
def real_documents() -> list[dict[str, Any]]:
    text = gzip.decompress(HANDBOOK.read_bytes()).decode() if HANDBOOK.exists() else ""
    handbook = [json.loads(line) for line in text.splitlines()]
    return [*handbook, *manual_pages()]


@pytest.mark.slow
def test_no_false_and_no_missed_removal_in_real_text(build_corpus: Build, tmp_path: Path) -> None:
    documents = [document for document in real_documents() if document["text"].strip()]
    if not documents:
        pytest.skip("neither Debian's handbook nor German manual pages are here")
    half = len(documents) // 2
    write_documents(tmp_path / "a.jsonl", documents[:half])
    write_documents(tmp_path / "b.jsonl", documents[half:])
    build_corpus(tmp_path, tmp_path / "out", part_bytes=1, max_reject_fraction=0)
    left, removals = deduplicated(documents, 4, 0.1, 20)
    corpus = Corpus(tmp_path / "out")
    assert documents_of(corpus) == left
    assert removals_of(corpus) == removals
    assert removals


@pytest.mark.slow
@pytest.mark.distributed
def test_the_bytes_are_the_same_for_any_number_of_workers(
    build_corpus: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The 18 workers are forked from a process that has their imports, which take most of their time."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lit_gpt.corpus.corpus_builder", "pandas"])
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: context)
    for number in range(8):
        write_documents(tmp_path / f"{number}.jsonl", made_up(40, number))
    settings: dict[str, Any] = {"part_bytes": 1, "id_field": None, "stages": ["repetition", "paragraph_dedup", "pii"]}
    settings |= {"max_duplicate_line_fraction": 0.5}
    source = tmp_path / "source"
    source.mkdir()
    for path in tmp_path.glob("*.jsonl"):
        path.rename(source / path.name)
    for workers in (1, 2, 7):
        build_corpus(source, tmp_path / f"out-{workers}", workers=workers, **settings)
    one, two, seven = (bytes_of(tmp_path / f"out-{workers}") for workers in (1, 2, 7))
    assert {name.split("/")[0] for name in one} == {
        "MANIFEST.json", "documents", "ids", "rejects.jsonl", "removed", "stats.json",
    }  # fmt: skip
    assert one == two == seven


def decided(words: list[int], repeated: list[int], **settings: Any) -> tuple[list[int], list[int]]:
    """Rules of the paragraphs, and fates, of one document."""
    flags = np.isin(np.arange(len(words)), repeated)
    limits = DedupSettings(**{"min_kept_fraction": 0, "min_kept_words": 0, **settings})
    decision = decide(np.array(words, np.uint32), np.array([0, len(words)]), flags, limits)
    return decision.cuts.tolist(), decision.fates.tolist()


def test_short_paragraphs_go_only_between_others_that_go() -> None:
    """min_words 4: runs of short repeats or blanks between two repeats go; at an edge, or with new text, they stay."""
    assert decided([1, 9, 9], [0, 1])[0] == [0, REPEATED, 0]
    assert decided([9, 1, BLANK, 2, 9, 5], [0, 1, 3, 4])[0] == [REPEATED, LEFT_OVER, LEFT_OVER, LEFT_OVER, REPEATED, 0]
    assert decided([9, 1, 2, 9, 5], [0, 1, 3])[0] == [REPEATED, 0, 0, REPEATED, 0], "2 words are new"
    assert decided([9, 1, 9, 5], [0, 1])[0] == [REPEATED, 0, 0, 0]
    assert decided([3, 4, 3], [0, 1, 2])[0] == [0, REPEATED, 0]


def test_a_document_that_keeps_little_goes_whole() -> None:
    """10 of 19 words stay: 0.526."""
    few, little = decided([9, 10], [0], min_kept_fraction=0.53), decided([9, 10], [0], min_kept_words=11)
    assert (few[1], little[1]) == ([2], [3])
    assert decided([9, 10], [0], min_kept_fraction=0.52, min_kept_words=10)[1] == [0]
    assert decided([2, 1], [], min_kept_words=50)[1] == [0], "it lost nothing"
    assert decided([9], [0])[1] == [3], "nothing is left"


A, B, C = "der Absatz A steht hier", "der Absatz B steht dort", "der Absatz C steht nirgends"


@pytest.mark.parametrize("keep_next", [True, False])
def test_the_next_survivor_keeps_what_a_fallen_document_had_first(
    build_corpus: Build, tmp_path: Path, keep_next: bool
) -> None:
    """two loses A and B and goes; its C is then in three alone."""
    texts = {"one": f"{A}\n{B}", "two": f"{A}\n{B}\n{C}", "three": f"{C}\nund noch ein eigener Absatz"}
    source = write_documents(tmp_path / "in.jsonl", [{"id": id, "text": text} for id, text in texts.items()])
    stats = build_corpus(
        source, tmp_path / "out", min_kept_fraction=0.5, min_kept_words=0, keep_next_survivor=keep_next
    )
    kept = dict(documents_of(Corpus(tmp_path / "out")))
    assert kept == {"one": texts["one"], "three": texts["three"] if keep_next else "und noch ein eigener Absatz"}
    assert stats["paragraph_dedup"]["vanished_texts"] == (0 if keep_next else 1)


@pytest.mark.timeout(120)
def test_a_document_falls_by_its_own_repeats(build_corpus: Build, tmp_path: Path) -> None:
    """one keeps 5 of its 25 words. Its fate is its own: rounds must end, with A in two."""
    texts = {"one": "\n".join([A] * 5), "two": f"{A}\nund noch ein eigener Absatz"}
    source = write_documents(tmp_path / "in.jsonl", [{"id": id, "text": text} for id, text in texts.items()])
    stats = build_corpus(source, tmp_path / "out", min_kept_fraction=0.5, min_kept_words=0)
    corpus = Corpus(tmp_path / "out")
    assert documents_of(corpus) == [("two", texts["two"])]
    assert removals_of(corpus) == [("one", None, "min_kept_fraction", None, None)]
    assert stats["paragraph_dedup"]["rounds"] == 2
    assert verify(corpus).faults == []


@pytest.mark.parametrize(
    ("first", "second", "equal"),
    [
        ("das ist schon so gewesen", "das ist schön so gewesen", False),
        ("im Jahr 1990 war das", "im Jahr 2024 war das", False),
        ("Das ist schon so gewesen", "das ist schon so gewesen", False),
        ("das  ist\tschon so gewesen ", "das ist schon so\u00a0gewesen", True),
        ("das ist u\u0308berall so gewesen", "das ist überall so gewesen", True),
        ("das ist schon so, gewesen", "das ist schon so gewesen", False),
        ("das ist schon so gewesen\r", "das ist schon so gewesen", True),
    ],
)
def test_what_is_equal(build_corpus: Build, tmp_path: Path, first: str, second: str, equal: bool) -> None:
    rest = "ein Satz nur für dieses Dokument, das sonst ginge"
    documents = [{"id": "1", "text": first}, {"id": "2", "text": f"{second}\n{rest}"}]
    source = write_documents(tmp_path / "in.jsonl", documents)
    build_corpus(source, tmp_path / "out", min_kept_fraction=0, min_kept_words=0)
    assert documents_of(Corpus(tmp_path / "out"))[1][1] == (rest if equal else f"{second}\n{rest}")
