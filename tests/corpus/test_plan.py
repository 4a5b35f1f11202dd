"""What `plan` says beside what a build takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from lit_gpt.corpus import plan as plan_file
from lit_gpt.corpus.plan import plan
from lit_gpt.corpus.settings import CorpusSettings
from tests.corpus.conftest import Build, made_up, write_documents


@pytest.mark.slow
def test_a_plan_says_what_the_build_takes(build_corpus: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """40 equal files: a sample of the first documents of 16 of them, and all that is then built."""
    (tmp_path / "in").mkdir()
    documents = made_up(50)
    for number in range(40):
        write_documents(tmp_path / f"in/{number:02d}.jsonl", documents)
    monkeypatch.setattr(plan_file, "SAMPLE_BYTES", 6 * sum(len(one["text"].encode()) for one in documents))
    stages = ["pii"]
    found = plan(CorpusSettings(source=[str(tmp_path / "in")], stages=stages, part_bytes=1))
    stats = build_corpus(tmp_path / "in", tmp_path / "out", stages=stages, part_bytes=1)
    assert (found.files, found.passes, found.tasks) == (40, 1, 40)
    assert found.stored_bytes == sum(path.stat().st_size for path in (tmp_path / "in").iterdir())
    assert found.text_bytes == pytest.approx(stats["text_bytes"], rel=0.05)
    assert found.documents == pytest.approx(stats["documents"], rel=0.05)
    assert found.kept_fraction == 1
    assert found.core_hours >= 0
    assert found.worker_bytes < 1e9


def test_a_plan_counts_passes_and_what_lies_between_them(build_corpus: Build, tmp_path: Path) -> None:
    """24 bytes a paragraph for its key, 4 for its words: what paragraph_dedup holds at least until the end."""
    documents = made_up(300)
    source = write_documents(tmp_path / "in.jsonl", documents)
    found = plan(CorpusSettings(source=[str(source)], stages=["paragraph_dedup"]))
    stats = build_corpus(source, tmp_path / "out")
    paragraphs = sum(1 for one in documents for line in one["text"].split("\n") if line.strip())
    assert found.passes == 2
    assert found.documents == stats["documents"] == len(documents)
    assert found.build_bytes >= 28 * paragraphs
    assert found.kept_fraction == pytest.approx(stats["kept_text_bytes"] / stats["text_bytes"])
    sizes = [
        path.stat().st_size for name in ("documents", "removed", "ids") for path in (tmp_path / "out" / name).iterdir()
    ]
    assert found.corpus_bytes == pytest.approx(sum(sizes), rel=0.1)
