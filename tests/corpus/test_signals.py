"""The stage quality_signals, on documents and signals as RedPajama-V2 has them, and on fields of a record."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from lit_gpt.cli import BadInput
from lit_gpt.corpus.corpus import Corpus
from lit_gpt.corpus.verify import verify
from lit_gpt.corpus.why import because, explain
from tests.corpus.conftest import Build, write_documents
from tests.corpus.test_paragraph_dedup import documents_of

FILE = "2023-14/0000/de_head.json.gz"
STAGES = ["quality_signals"]


def signals_of(number: int, values: dict[str, Any]) -> dict[str, Any]:
    return {"id": f"{FILE}/{number}", "quality_signals": values}


def red_pajama(folder: Path, words: list[float | None]) -> tuple[Path, Path]:
    """documents/ and quality_signals/, a document for each count of words; the third line is no document."""
    documents, signals = folder / "documents", folder / "quality_signals"
    lines: list[dict[str, Any]] = [
        {"raw_content": "Text", "digest": f"sha1:{number}", "url": f"http://{number}.de", "perplexity": number}
        for number in range(len(words))
    ]  # fmt: skip
    lines[2].pop("raw_content")
    records = [signals_of(number, {"rps_doc_word_count": [[0, 6, count]], "spans": [[0, 1, 2], [1, 2, 3]]})
               for number, count in enumerate(words)]  # fmt: skip
    for path, written in ((documents / FILE, lines), (signals / FILE.replace(".json", ".signals.json"), records)):
        path.parent.mkdir(parents=True)
        write_documents(path, written)
    return documents, signals


def settings_of(signals: Path, **more: Any) -> dict[str, Any]:
    return {
        "stages": STAGES, "text_field": "raw_content", "id_field": "digest", "max_reject_fraction": 0.5,
        "signals_path": str(signals), **more,
    }  # fmt: skip


def test_signals_of_redpajama_are_limits(build_corpus: Build, tmp_path: Path) -> None:
    """49 is below 50; null breaks no limit; the record's own perplexity is a signal too."""
    documents, signals = red_pajama(tmp_path, [50.0, 49.0, 7.0, None, 60.0, 70.0])
    settings = settings_of(signals, min_signals=["rps_doc_word_count=50"], max_signals=["perplexity=4"])
    build_corpus(documents, tmp_path / "out", **settings)
    corpus = Corpus(tmp_path / "out")
    assert [id for id, _ in documents_of(corpus)] == ["sha1:0", "sha1:3", "sha1:4"]
    said = [because(explain(corpus, id)[0].rows[0]) for id in ("sha1:1", "sha1:5")]
    assert said == [
        "quality_signals, min_rps_doc_word_count: 49, limit 50", "quality_signals, max_perplexity: 5, limit 4",
    ]  # fmt: skip
    assert verify(corpus).faults == []


@pytest.mark.parametrize("as_text", [False, True])
def test_a_record_may_hold_its_signals(build_corpus: Build, tmp_path: Path, as_text: bool) -> None:
    """As an object, or as the JSON of one, as the Hub's loader of RedPajama-V2 gives it."""
    held = [{"score": [[0, 4, value]]} for value in (0.4, 0.6)]
    documents = [
        {"id": str(number), "text": "Text", "quality_signals": json.dumps(one) if as_text else one}
        for number, one in enumerate(held)
    ]
    source = write_documents(tmp_path / "in.jsonl", documents)
    build_corpus(source, tmp_path / "out", stages=STAGES, min_signals=["score=0.5"])
    assert [id for id, _ in documents_of(Corpus(tmp_path / "out"))] == ["1"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"min_signals": ["rps_doc_words=50"]},
            r"line 1: no signal rps_doc_words; there are perplexity, rps_doc",
        ),
        ({"min_signals": ["spans=50"]}, "signal spans has no one value for the document"),
        ({"min_signals": ["url=50"]}, "signal url is 'http://0.de', which is no number"),
        ({"min_signals": ["rps_doc_word_count>50"]}, "must be SIGNAL=NUMBER"),
        ({"min_signals": ["rps_doc_word_count=nan"]}, "must be SIGNAL=NUMBER"),
        ({"min_signals": []}, "need each other"),
        ({"min_signals": [], "stages": ["pii"]}, "need each other"),
        ({"min_signals": ["rps_doc_word_count=50"], "stages": []}, "need each other"),
        ({"min_signals": ["rps_doc_word_count=50"], "signals_path": "/none"}, "no file of signals /none/2023-14"),
    ],
)
def test_signals_that_cannot_be_used_are_refused(
    build_corpus: Build, tmp_path: Path, settings: dict[str, Any], said: str
) -> None:
    documents, signals = red_pajama(tmp_path, [50.0, 49.0, 7.0])
    with pytest.raises(BadInput, match=said):
        build_corpus(documents, tmp_path / "out", **settings_of(signals, **settings))


def test_signals_of_other_documents_are_refused(build_corpus: Build, tmp_path: Path) -> None:
    """A line is missing: from there on each line is another document's."""
    documents, signals = red_pajama(tmp_path, [50.0] * 5)
    path = signals / FILE.replace(".json", ".signals.json")
    lines = [
        {"id": f"{FILE}/{number}", "quality_signals": {"rps_doc_word_count": [[0, 6, 50]]}} for number in (0, 2, 3, 4)
    ]
    write_documents(path, lines)
    with pytest.raises(BadInput, match=r"line 2 is of document .*/2, not of line 2"):
        build_corpus(documents, tmp_path / "out", **settings_of(signals, min_signals=["rps_doc_word_count=50"]))
    write_documents(path, lines[:1])
    with pytest.raises(BadInput, match="has no line 2: it does not belong to"):
        build_corpus(documents, tmp_path / "cut", **settings_of(signals, min_signals=["rps_doc_word_count=50"]))


@pytest.mark.parametrize(
    ("held", "said"),
    [
        ("{", "line 1: quality_signals is no JSON"),
        ("[1]", "line 1: quality_signals is no object of JSON"),
        ('{"score": 1e999}', "line 1: "),
    ],
)
def test_signals_in_a_record_that_cannot_be_read(build_corpus: Build, tmp_path: Path, held: object, said: str) -> None:
    source = write_documents(tmp_path / "in.jsonl", [{"id": "a", "text": "Text", "quality_signals": held}])
    with pytest.raises(BadInput, match=said):
        build_corpus(source, tmp_path / "out", stages=STAGES, min_signals=["score=0.5"])


def test_signals_in_a_file_that_cannot_be_read(build_corpus: Build, tmp_path: Path) -> None:
    documents, signals = red_pajama(tmp_path, [50.0] * 3)
    path = signals / FILE.replace(".json", ".signals.json")
    settings = settings_of(signals, min_signals=["rps_doc_word_count=50"])
    for number, (line, said) in enumerate([("{", "no JSON"), ('{"id": "x/0"}', "quality_signals is no object")]):
        with gzip.open(path, "wt") as file:
            file.write(line + "\n")
        with pytest.raises(BadInput, match=f"line 1.* is {said}|line 1: {said}"):
            build_corpus(documents, tmp_path / str(number), **settings)
