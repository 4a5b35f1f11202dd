"""Paragraph deduplication as docs/corpus.md states it, in the plainest way: one document after the other, in memory."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from typing import Any

Removal = tuple[str, int | None, str, str | None, int | None]
"""Document, paragraph (None: all), rule, and the paragraph that stays: its document and its number."""


def key_of(line: str) -> str:
    return " ".join(unicodedata.normalize("NFC", line).split())


def words_of(line: str) -> int:
    return len(re.findall(r"[^\W_]+", unicodedata.normalize("NFC", line)))


def deduplicated(
    documents: Iterable[dict[str, Any]], min_words: int, min_kept_fraction: float, min_kept_words: int
) -> tuple[list[tuple[str, str]], list[Removal]]:
    """Id and text of what is left, and all removals, in order."""
    first: dict[str, tuple[str, int]] = {}
    left: list[tuple[str, str]] = []
    removals: list[Removal] = []
    for document in documents:
        id, lines = document["id"], document["text"].split("\n")
        keys, words = [key_of(line) for line in lines], [words_of(line) for line in lines]
        known: list[tuple[str, int] | None] = []
        inside: dict[str, tuple[str, int]] = {}
        for number, key in enumerate(keys):
            known.append((first.get(key) or inside.get(key)) if key else None)
            if key:
                inside.setdefault(key, (id, number))
        gone = {number for number in range(len(lines)) if known[number] and words[number] >= min_words}
        own: list[Removal] = []
        for number in range(len(lines)):
            if number in gone:
                own.append((id, number, "repeated_paragraph", *known[number]))  # type: ignore[misc]
                continue
            low = high = number
            while low >= 0 and low not in gone and words[low] < min_words and (known[low] or not keys[low]):
                low -= 1
            while (
                high < len(lines) and high not in gone and words[high] < min_words and (known[high] or not keys[high])
            ):
                high += 1
            if low < number < high and low in gone and high in gone:
                own.append((id, number, "left_over", *(known[number] or (None, None))))
        cut = {removal[1] for removal in own}
        kept = sum(words[number] for number in range(len(lines)) if number not in cut)
        if own and kept / max(sum(words), 1) < min_kept_fraction:
            removals.append((id, None, "min_kept_fraction", None, None))
        elif own and kept < max(1, min_kept_words):
            removals.append((id, None, "min_kept_words", None, None))
        else:
            removals += own
            left.append((id, "\n".join(line for number, line in enumerate(lines) if number not in cut)))
            for key, place in inside.items():
                first.setdefault(key, place)
    return left, removals
