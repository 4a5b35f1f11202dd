"""What the filters measure beside datatrove's own functions, and beside the plainest Python for what these hide."""

from __future__ import annotations

import random
import re
from typing import Any

import pytest
from datatrove.pipeline.filters.gopher_repetition_filter import (
    find_all_duplicate,
    find_duplicates,
    find_top_duplicate,
    get_n_grams,
)

from lit_gpt.corpus.measures import DUPLICATE, TOP, Batch
from tests.corpus.test_paragraph_dedup import real_documents

PIECES = ["a", "b ", "ß", " ", "\n", "...", ".", "…", "#", "- ", "•", "1", "a b a b ", "\u00a0", "x-y", "'", "und "]


def made_up(seed: int) -> list[str]:
    choice = random.Random(seed)
    return ["".join(choice.choices(PIECES, k=choice.randint(0, 60))) for _ in range(choice.randint(1, 5))]


def words_of(text: str) -> list[str]:
    """What lies between spaces, from its first letter or digit to its last, and each mark before and after that."""
    words = []
    for lump in text.split():
        inner = re.search(r"[^\W_](.*[^\W_])?", lump)
        begin, end = inner.span() if inner else (len(lump), len(lump))
        words += [*lump[:begin], *([inner[0]] if inner else []), *lump[end:]]
    return words


def expected(text: str, stop_words: list[str]) -> dict[str, float]:
    words, lines = words_of(text), [line for line in text.split("\n") if line.strip()]
    repeated_lines, repeated_characters = find_duplicates(lines)
    found: dict[str, float] = {"duplicate_line_fraction": repeated_lines / max(len(lines), 1)}
    for n in TOP:
        grams = get_n_grams(words, n)
        found[f"top_{n}gram_fraction"] = (find_top_duplicate(grams) if grams else 0) / max(len(text), 1)
    for n in DUPLICATE:
        found[f"duplicate_{n}gram_fraction"] = find_all_duplicate(words, n) / max(len(text), 1)
    prose = [word for word in words if re.match(r"[^\W_]", word)]
    bullets = [line.lstrip().startswith(("•", "-")) for line in lines]
    trailing = [line.rstrip().endswith(("...", "…")) for line in lines]
    return found | {
        "words": len(prose),
        "mean_word_length": sum(map(len, prose)) / max(len(prose), 1),
        "hash_fraction": text.count("#") / max(len(words), 1),
        "ellipsis_fraction": (text.count("...") + text.count("…")) / max(len(words), 1),
        "bullet_line_fraction": sum(bullets) / max(len(lines), 1),
        "ellipsis_line_fraction": sum(trailing) / max(len(lines), 1),
        "alphabetic_word_fraction": sum(any(map(str.isalpha, word)) for word in words) / max(len(words), 1),
        "stop_words": len({*stop_words} & {*words}),
        "newline_fraction": text.count("\n") / max(len(words), 1),
        "duplicate_character_fraction": repeated_characters / max(len(text.replace("\n", "")), 1),
    }


def measured(texts: list[str], stop_words: list[str]) -> list[dict[str, Any]]:
    batch = Batch(texts)
    columns = {name: values.tolist() for name, values in {**batch.repetition(), **batch.quality(stop_words)}.items()}
    return [{name: values[number] for name, values in columns.items()} for number in range(len(texts))]


def test_made_up_texts_measure_as_datatrove_says() -> None:
    for seed in range(400):
        texts = made_up(seed)
        for text, found in zip(texts, measured(texts, ["a", "und"]), strict=True):
            assert found == pytest.approx(expected(text, ["a", "und"])), repr(text)


def test_real_texts_measure_as_datatrove_says() -> None:
    texts = [document["text"][:20_000] for document in real_documents()[::40]]
    if not texts:
        pytest.skip("neither Debian's handbook nor German manual pages are here")
    stop_words = ["der", "die", "und"]
    for text, found in zip(texts, measured(texts, stop_words), strict=True):
        assert found == pytest.approx(expected(text, stop_words))
