"""The stages decontaminate and minhash, and what stages after paragraph_dedup do to first occurrences."""

from __future__ import annotations

import json
import logging
import random
from pathlib import Path
from typing import Any

import pytest

from lit_gpt.cli import BadInput
from lit_gpt.corpus.corpus import Corpus
from lit_gpt.corpus.verify import verify
from lit_gpt.corpus.why import because, explain
from tests.corpus.conftest import Build, write_documents
from tests.corpus.test_paragraph_dedup import bytes_of, documents_of, removals_of

QUESTION = "Welche Stadt liegt an der Mündung des kleinen Flusses, den die alte Karte im Rathaus zeigt?"
ANSWER = "die Stadt mit den neun hohen Türmen"
SHORT = "sieben Wörter sind zu wenig zum Suchen"


def evaluation(folder: Path) -> Path:
    """An lm-eval task: YAML that names a file of records in what it includes, and another file elsewhere."""
    folder.mkdir()
    (folder / "task.yaml").write_text(
        "task: karte\ninclude: _template\ndoc_to_text: !function utils.text\nmetadata: {source: raw.jsonl.gz}\n"
    )
    (folder / "_template").write_text("dataset_path: json\ndataset_kwargs:\n  data_files: {test: test.jsonl}\n")
    (folder / "utils.py").write_text("text = str\n")
    (folder / "test.jsonl").write_text(json.dumps({"frage": QUESTION, "wahl": [ANSWER, SHORT]}) + "\n")
    return folder / "task.yaml"


def test_documents_with_an_ngram_of_an_evaluation_go(build_corpus: Build, tmp_path: Path) -> None:
    """13 of the 16 words of the question, in other case and marks; 12; and all 8 words of nothing."""
    words = QUESTION.replace(",", "").replace("?", "").split()
    assert len(words) == 16
    texts = {
        "thirteen": "Vorher steht dies. " + " - ".join(words[2:15]).upper() + " und danach das.",
        "twelve": "Vorher steht dies. " + " ".join(words[2:14]) + " und danach das.",
        "none": "Ein ganz anderer Text über Wälder und Wiesen und was dort alles wächst und lebt und vergeht.",
        "short": f"Hier steht {SHORT}, und {ANSWER} auch.",
    }
    source = write_documents(tmp_path / "in.jsonl", [{"id": id, "text": text} for id, text in texts.items()])
    task = evaluation(tmp_path / "task")
    build_corpus(source, tmp_path / "out", stages=["decontaminate"], evaluation_texts=[str(task)])
    build_corpus(source, tmp_path / "same", stages=["decontaminate"], evaluation_texts=[str(task.parent)])
    assert documents_of(Corpus(tmp_path / "same")) == documents_of(Corpus(tmp_path / "out"))
    corpus = Corpus(tmp_path / "out")
    assert [id for id, _ in documents_of(corpus)] == ["twelve", "none", "short"]
    (found,) = explain(corpus, "thirteen")
    assert because(found.rows[0]) == (
        "decontaminate, evaluation_ngram: 1 n-grams of evaluations, the first in test.jsonl:1 frage"
    )
    assert verify(corpus).faults == []


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", "zu kurz", "no text there has 8 words"),
        ("a.bin", "x", "of no known kind"),
        ("a.yaml", "x: y", "names no file"),
    ],
)
def test_evaluation_texts_that_cannot_be_used_are_refused(
    build_corpus: Build, tmp_path: Path, name: str, content: str, said: str
) -> None:
    source = write_documents(tmp_path / "in.jsonl", [{"id": "1", "text": "ein Text"}])
    (tmp_path / name).write_text(content)
    with pytest.raises(BadInput, match=said):
        build_corpus(source, tmp_path / "out", stages=["decontaminate"], evaluation_texts=[str(tmp_path / name)])


def test_a_text_goes_on_to_the_next_document_that_all_stages_keep(build_corpus: Build, tmp_path: Path) -> None:
    """first has two paragraphs first, one of which is an evaluation's. second repeats both, third and fourth the
    other: second goes as first does, so third keeps the other, and fourth loses it."""
    other = "dieser Absatz steht in allen vier Dokumenten an einer Stelle"
    names = ("first", "second", "third", "fourth")
    own = {name: f"das Eigene von {name}, das es nirgends sonst gibt" for name in names}
    texts = {
        "first": f"{other}\n{QUESTION}\n{own['first']}",
        "second": f"{QUESTION}\n{other}\n{own['second']}",
        "third": f"{own['third']}\n{other}",
        "fourth": f"{other}\n{own['fourth']}",
    }
    documents = [{"id": id, "text": text} for id, text in texts.items()]
    for number, document in enumerate(documents):
        write_documents(tmp_path / f"{number}.jsonl", [document])
    task = evaluation(tmp_path / "task")
    (tmp_path / "in").mkdir()
    for number in range(4):
        (tmp_path / f"{number}.jsonl").rename(tmp_path / f"in/{number}.jsonl")
    settings: dict[str, Any] = {
        "stages": ["paragraph_dedup", "decontaminate"], "evaluation_texts": [str(task)], "part_bytes": 1,
        "min_kept_words": 0, "min_kept_fraction": 0,
    }  # fmt: skip
    stats = build_corpus(tmp_path / "in", tmp_path / "out", **settings)
    corpus = Corpus(tmp_path / "out")
    assert dict(documents_of(corpus)) == {"third": texts["third"], "fourth": own["fourth"]}
    assert stats["paragraph_dedup"]["lost_later"] == 0
    assert ("fourth", 0, "repeated_paragraph", "third", 1) in removals_of(corpus)
    assert verify(corpus).faults == []

    stats = build_corpus(tmp_path / "in", tmp_path / "lost", keep_next_survivor=False, **settings)
    assert dict(documents_of(Corpus(tmp_path / "lost")))["third"] == own["third"]
    assert stats["paragraph_dedup"]["lost_later"] == 4, "two of second, one of third, one of fourth"


def test_a_document_that_fell_as_a_copy_stays_if_a_later_stage_removes_the_other(
    build_corpus: Build, tmp_path: Path
) -> None:
    """copy has nothing of its own, so it goes whole; but the document that it repeats has an evaluation's text."""
    text = "dieser Absatz steht in zwei Dokumenten\nund dieser andere Absatz steht auch in beiden"
    documents = [{"id": "evaluation", "text": f"{text}\n{QUESTION}"}, {"id": "copy", "text": text}]
    build_corpus(
        write_documents(tmp_path / "in.jsonl", documents), tmp_path / "out", min_kept_words=0,
        stages=["paragraph_dedup", "decontaminate"], evaluation_texts=[str(evaluation(tmp_path / "task"))],
    )  # fmt: skip
    assert documents_of(Corpus(tmp_path / "out")) == [("copy", text)]


@pytest.mark.slow
def test_rounds_are_few_where_all_documents_have_an_evaluations_text(
    build_corpus: Build, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of 100 documents one more would keep the text in each round, and be removed; each round tries more of them."""
    documents = [
        {"id": f"d{number}", "text": f"{QUESTION}\nein eigener Absatz {number} mit eigenen Worten {number * number}"}
        for number in range(100)
    ]
    with caplog.at_level(logging.INFO):
        build_corpus(
            write_documents(tmp_path / "in.jsonl", [*documents, {"id": "clean", "text": "und einer ohne jede Frage"}]),
            tmp_path / "out", stages=["paragraph_dedup", "decontaminate"], min_kept_words=0,
            evaluation_texts=[str(evaluation(tmp_path / "task"))],
        )  # fmt: skip
    assert [id for id, _ in documents_of(Corpus(tmp_path / "out"))] == ["clean"]
    assert sum("another round" in line for line in caplog.messages) <= 8


@pytest.mark.slow
def test_rounds_end_where_each_removal_brings_another_about(build_corpus: Build, tmp_path: Path) -> None:
    """Families of four pages, in which one word of 60 differs: what one round removes, the next would keep, without
    end. Of each family at least one page stays, and no text is lost."""
    choice, letters = random.Random(17), "abdefghiklmnoprstuwz"
    words = ["".join(choice.choices(letters, k=choice.randint(3, 9))) for _ in range(3000)]
    pages = []
    for family in range(30):
        lines = [choice.choices(words, k=30) for _ in range(8)]
        for copy in range(4):
            own = [[choice.choice(words) if copy and choice.random() < 1 / 60 else w for w in line] for line in lines]
            pages.append({"id": f"{family}-{copy}", "text": "\n".join(map(" ".join, own))})
    choice.shuffle(pages)
    source = write_documents(tmp_path / "in.jsonl", pages)
    stats = build_corpus(source, tmp_path / "out", stages=["paragraph_dedup", "minhash"])
    corpus = Corpus(tmp_path / "out")
    assert {id.split("-")[0] for id, _ in documents_of(corpus)} == {str(family) for family in range(30)}
    assert stats["paragraph_dedup"]["lost_later"] == 0
    assert verify(corpus).faults == []


def labelled(pairs: int) -> tuple[list[dict[str, Any]], set[str]]:
    """Documents of 120 words, of which some have a copy with one or two words changed; the ids of the copies.

    One changed word changes 5 of 116 shingles: a similarity of 0.92; two, 0.84.
    """
    choice = random.Random(3407)
    letters = "abdefghiklmnoprstuwz"
    words = ["".join(choice.choices(letters, k=choice.randint(3, 9))) for _ in range(3000)]
    documents, copies = [], set()
    for number in range(pairs):
        text = choice.choices(words, k=120)
        documents.append({"id": f"d{number}", "text": " ".join(text)})
        if number % 2:
            changed = list(text)
            for at in choice.sample(range(120), 1 + number % 4 // 3):
                changed[at] = "anders"
            documents.append({"id": f"copy{number}", "text": " ".join(changed)})
            copies.add(f"copy{number}")
        else:  # half of the words of another: a similarity of some 0.3
            documents.append({"id": f"half{number}", "text": " ".join(text[:60] + choice.choices(words, k=60))})
    choice.shuffle(documents)
    return documents, copies


@pytest.mark.slow
def test_minhash_finds_near_duplicates(build_corpus: Build, tmp_path: Path) -> None:
    """F1 of at least 0.95 over pairs; one of each pair stays, and the ledger says which."""
    documents, copies = labelled(120)
    (tmp_path / "in").mkdir()
    write_documents(tmp_path / "in/a.jsonl", documents[:100])
    write_documents(tmp_path / "in/b.jsonl", documents[100:])
    build_corpus(tmp_path / "in", tmp_path / "out", stages=["minhash"], part_bytes=1)
    corpus = Corpus(tmp_path / "out")
    pairs = {frozenset((id, str(of))) for id, _, _, of, _ in removals_of(corpus)}
    true = {frozenset((copy, copy.replace("copy", "d"))) for copy in copies}
    hits = len(pairs & true)
    assert 2 * hits / (len(pairs) + len(true)) >= 0.95
    assert len(documents_of(corpus)) == len(documents) - len(pairs)
    assert verify(corpus).faults == []
    build_corpus(tmp_path / "in", tmp_path / "again", stages=["minhash"], part_bytes=1)
    assert bytes_of(tmp_path / "again") == bytes_of(tmp_path / "out")
