"""Corpora for the tests of the room corpus/."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from lit_gpt.corpus.corpus_builder import build
from lit_gpt.corpus.settings import CorpusSettings

Build = Callable[..., dict[str, Any]]
WORDS = "Wald Wiese Straße über grün läuft Hund 1990 2024 schon schön Fluss Brücke und die der das mit im in den"


def write_documents(path: Path, documents: Sequence[dict[str, Any]]) -> Path:
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(document, ensure_ascii=False) + "\n" for document in documents)
    return path


def made_up(documents: int, seed: int = 3407) -> list[dict[str, Any]]:
    """Documents of paragraphs that often occur in others too: long ones, short ones, blank ones, whole copies."""
    choice, words = random.Random(seed), WORDS.split()
    pool = [" ".join(choice.choices(words, k=choice.choice((1, 2, 3, 4, 8, 20)))) for _ in range(60)]
    pool += ["", " ", "***", "\u00a0"]
    found: list[dict[str, Any]] = []
    for number in range(documents):
        lines = [
            choice.choice(pool) if choice.random() < 0.7 else f"{number} " + " ".join(choice.choices(words, k=9))
            for _ in range(choice.randint(1, 12))
        ]
        text = "\n".join(lines)
        if found and choice.random() < 0.05:
            text = choice.choice(found)["text"]
        if text.strip():
            found.append({"id": f"d{number}", "text": text, "url": f"https://example.org/{number}", "n": number})
    return found


def built(source: Path, out: Path, **settings: Any) -> dict[str, Any]:
    """Build a corpus of paragraph deduplication alone, unless other stages are given; returns stats.json."""
    values = {"stages": ["paragraph_dedup"], "workers": 1, **settings}
    made = CorpusSettings(source=[str(source)], destination_path=str(out), **values)
    made.check()
    stats = build(made, lambda progress: None)
    assert stats is not None
    return stats


@pytest.fixture
def build_corpus() -> Build:
    return built
