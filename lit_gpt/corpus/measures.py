"""What the filters measure of documents, for many at once: repetition (Gopher) and quality (Gopher, FineWeb).

Definitions are those of datatrove's GopherRepetitionFilter, GopherQualityFilter and FineWebQualityFilter, for lines
that are not blank and this kind of words (datatrove asks spaCy): what lies between two spaces, from its first letter or
digit to its last, and each mark before and after that. Equality is that of 64-bit hashes, which are polynomials over
the characters, and over the words.
Costs: about 20 MB/s a core.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from lit_gpt.corpus.line_words import mark

Array = npt.NDArray[Any]
TOP, DUPLICATE = (2, 3, 4), (5, 6, 7, 8, 9, 10)
"""Words of the n-grams of which the most frequent, and those that occur before, are measured."""
_WORD, _ALPHA, _SPACE, _NEWLINE, _HASH, _ELLIPSIS, _DOT, _BULLET = (1 << bit for bit in range(8))
_BASE, _WORD_BASE = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD6E8FEB86659FD93)


@functools.cache
def _kinds() -> Array:
    """What each character is, as bits."""
    word, alpha, space = (np.zeros(sys.maxunicode + 1, np.uint8) for _ in range(3))
    mark(word, r"[^\W_]+", _WORD)
    mark(space, r"\s+", _SPACE)
    for code in np.flatnonzero(word).tolist():
        alpha[code] = _ALPHA * chr(code).isalpha()
    kinds = word | alpha | space
    for letter, bit in (("\n", _NEWLINE), ("#", _HASH), ("…", _ELLIPSIS), (".", _DOT), ("•", _BULLET), ("-", _BULLET)):
        kinds[ord(letter)] |= bit
    return kinds


@functools.cache
def _powers(base: int, count: int) -> Array:
    """base ** 0, 1, ... modulo 2 ** 64."""
    powers = np.full(count, base, np.uint64)
    powers[0] = 1
    return np.multiply.accumulate(powers)


def _mixed(values: Array) -> Array:
    """Each 64-bit value spread over all bits (the finaliser of MurmurHash3)."""
    values = values ^ values >> np.uint64(33)
    values = values * np.uint64(0xFF51AFD7ED558CCD)
    values ^= values >> np.uint64(33)
    values *= np.uint64(0xC4CEB9FE1A85EC53)
    return values ^ values >> np.uint64(33)


class Batch:
    """Texts that are measured together."""

    def __init__(self, texts: Sequence[str], *, only_letters: bool = False) -> None:
        """only_letters: words are runs of letters and digits, and marks are none."""
        self.size = np.array([len(text) for text in texts])
        joined = "\n" + "\n".join(texts) + "\n"
        self._codes = np.frombuffer(joined.encode("utf-32-le"), np.uint32)
        self._bits = _kinds()[self._codes]
        self._begin = 1 + np.cumsum(self.size + 1) - (self.size + 1)  # of each text
        self._edges = np.append(self._begin, len(self._codes))
        bits = self._bits
        space = bits & _SPACE > 0
        inside = bits & _WORD > 0 if only_letters else _joined(bits & _WORD > 0, space)
        begins = inside.copy() if only_letters else ~space
        begins[1:] &= ~(inside[1:] & inside[:-1])
        self._starts = np.flatnonzero(begins)
        ends_inside = np.append(inside[1:], False)
        self._ends = np.flatnonzero((inside & ~ends_inside) | (begins & ~inside)) + 1
        self._lengths = self._ends - self._starts
        self._first = np.searchsorted(self._starts, self._edges)  # number of each text's first word
        self._document = np.repeat(np.arange(len(self.size)), np.diff(self._first))
        size = 1 << (len(self._codes) - 1).bit_length()
        values = _mixed(self._codes.astype(np.uint64) + np.uint64(1))
        self._prefix = np.concatenate([[np.uint64(0)], np.cumsum(values * _powers(int(_BASE), size)[: len(values)])])
        self._inverse = _powers(pow(int(_BASE), -1, 1 << 64), size)
        self._last_rolled = (0, np.zeros(0, np.uint64))

    def _hashes(self, starts: Array, ends: Array) -> Array:
        """Of stretches of characters."""
        return _mixed((self._prefix[ends] - self._prefix[starts]) * self._inverse[starts])

    @functools.cached_property
    def _words(self) -> Array:
        return self._hashes(self._starts, self._ends)

    def _per_text(self, flags: Array) -> Array:
        """How many characters of each text have the flag; few should."""
        return np.diff(np.searchsorted(np.flatnonzero(flags), self._edges))

    def _per_word_of_text(self, values: Array) -> Array:
        sums = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
        return np.diff(sums[self._first])

    # Lines

    @functools.cached_property
    def _lines(self) -> tuple[Array, Array, Array]:
        """Begin, end and text of each line that is not blank."""
        breaks = np.flatnonzero(self._bits & _NEWLINE)
        begins, ends = breaks[:-1] + 1, breaks[1:]
        kept = np.searchsorted(self._starts, ends) > np.searchsorted(self._starts, begins)
        begins, ends = begins[kept], ends[kept]
        return begins, ends, np.searchsorted(self._begin, begins, side="right") - 1

    def _duplicate_lines(self) -> tuple[Array, Array, Array]:
        """For each text: lines, lines that occur before, characters of these."""
        begins, ends, text = self._lines
        again = _again(self._hashes(begins, ends), text)
        texts = len(self.size)
        return (
            np.bincount(text, minlength=texts),
            np.bincount(text[again], minlength=texts),
            np.bincount(text[again], (ends - begins)[again], minlength=texts),
        )

    def repetition(self) -> dict[str, Array]:
        """Shares of what is repeated inside each text."""
        lines, again, _ = self._duplicate_lines()
        found = {"duplicate_line_fraction": again / np.maximum(lines, 1)}
        size = np.maximum(self.size, 1)
        for n in TOP:
            found[f"top_{n}gram_fraction"] = self._top(n) / size
        some = np.ones(len(self.size), bool)
        for n in DUPLICATE:
            found[f"duplicate_{n}gram_fraction"], some = self._duplicates(n, some)
            found[f"duplicate_{n}gram_fraction"] /= size
        return found

    def _ngrams(self, n: int, texts: Array | None = None) -> tuple[Array, Array]:
        """Number of the first word of each n-gram, and its hash, for the texts that are asked for."""
        count = max(0, len(self._words) - n + 1)
        whole = self._document[:count] == self._document[n - 1 :]
        if texts is not None:
            whole &= texts[self._document[:count]]
        positions = np.flatnonzero(whole)
        return positions, _mixed(self._rolled(n)[positions])

    def _rolled(self, n: int) -> Array:
        """The polynomial over each n words that follow each other; those of n - 1 words are the last that were asked
        for, or are made."""
        if self._last_rolled[0] != n:
            before = self._rolled(n - 1) if n > 1 else np.zeros(len(self._words) + 1, np.uint64)
            self._last_rolled = (n, before[:-1] * _WORD_BASE + self._words[n - 1 :])
        return self._last_rolled[1]

    @functools.cached_property
    def _length_sums(self) -> Array:
        return np.concatenate([[0], np.cumsum(self._lengths)])

    def _characters(self, positions: Array, n: int) -> Array:
        return self._length_sums[positions + n] - self._length_sums[positions]

    def _top(self, n: int) -> Array:
        """Characters, with spaces between words, in all occurrences of the most frequent n-gram of each text."""
        positions, hashes = self._ngrams(n)
        result = np.zeros(len(self.size), np.int64)
        if not len(positions):
            return result
        document = self._document[positions]
        texts, earliest = np.unique(document, return_index=True)  # where nothing is repeated, the first one
        result[texts] = self._characters(positions[earliest], n) + n - 1
        order, starts = _grouped(hashes, document)
        counts = np.diff(np.append(starts, len(order)))
        first, repeated = np.minimum.reduceat(order, starts), counts > 1
        first, counts = first[repeated], counts[repeated]
        text = document[first]
        ranked = np.lexsort((first, -counts, text))  # of equally frequent ones the earliest, as in a Counter
        best = ranked[np.unique(text[ranked], return_index=True)[1]]
        result[text[best]] = counts[best] * (self._characters(positions[first[best]], n) + n - 1)
        return result

    def _duplicates(self, n: int, texts: Array) -> tuple[Array, Array]:
        """Characters in n-grams that occur before, counted without overlap from the left; which texts have any."""
        result, some = np.zeros(len(self.size)), np.zeros(len(self.size), bool)
        positions, hashes = self._ngrams(n, texts)
        document = self._document[positions]
        again = np.flatnonzero(_again(hashes, document))
        for text in np.unique(document[again]).tolist():
            begin, end = np.searchsorted(document, [text, text + 1])
            sizes = self._characters(positions[begin:end], n).tolist()
            later = again[np.searchsorted(again, begin) : np.searchsorted(again, end)] - begin
            result[text] = _without_overlap(hashes[begin:end].tolist(), sizes, later.tolist(), n)
            some[text] = True
        return result, some

    # Quality

    def quality(self, stop_words: Sequence[str]) -> dict[str, Array]:
        """Counts and shares that tell prose from other text."""
        bits = self._bits
        inside = bits[self._starts] & _WORD > 0
        all_words = np.maximum(np.diff(self._first), 1)
        words = self._per_word_of_text(inside)
        borders = np.stack([self._starts, self._ends], axis=1).reshape(-1)
        alphabetic = np.bitwise_or.reduceat(bits, borders)[::2] & _ALPHA > 0 if len(borders) else inside
        begins, ends, text = self._lines
        texts = len(self.size)
        lines, _, repeated = self._duplicate_lines()
        lines = np.maximum(lines, 1)
        newlines = self._per_text(bits & _NEWLINE) - 1
        no_newlines = np.maximum(self.size - newlines, 1)
        last = self._ends[np.searchsorted(self._ends, ends, side="right") - 1] - 1
        dots = self._dots()
        first = self._starts[np.searchsorted(self._starts, begins)]
        bullets = bits[first] & _BULLET > 0
        trailing = (bits[last] & _ELLIPSIS > 0) | dots[last]
        return {
            "words": words,
            "mean_word_length": self._per_word_of_text(self._lengths * inside) / np.maximum(words, 1),
            "hash_fraction": self._per_text(bits & _HASH) / all_words,
            "ellipsis_fraction": self._ellipses() / all_words,
            "bullet_line_fraction": np.bincount(text, bullets, minlength=texts) / lines,
            "ellipsis_line_fraction": np.bincount(text, trailing, minlength=texts) / lines,
            "alphabetic_word_fraction": self._per_word_of_text(alphabetic) / all_words,
            "stop_words": self._different(stop_words),
            "newline_fraction": newlines / all_words,
            "duplicate_character_fraction": repeated / no_newlines,
        }

    def _dots(self) -> Array:
        """Whether three dots end at each character."""
        dot = self._bits & _DOT > 0
        three = np.zeros(len(dot), bool)
        three[2:] = dot[2:] & dot[1:-1] & dot[:-2]
        return three

    def _ellipses(self) -> Array:
        """Ellipses of each text: the character, or three dots that overlap no others."""
        begins, ends = _runs(np.flatnonzero(self._bits & _DOT))
        threes = np.concatenate([[0], np.cumsum((ends - begins) // 3)])
        return np.diff(threes[np.searchsorted(begins, self._edges)]) + self._per_text(self._bits & _ELLIPSIS)

    def _different(self, stop_words: Sequence[str]) -> Array:
        """How many different stop words each text has."""
        known = np.sort(Batch([" ".join(stop_words)])._words) if stop_words else np.zeros(1, np.uint64)
        at = np.minimum(np.searchsorted(known, self._words), len(known) - 1)
        found = known[at] == self._words
        pairs = np.unique(self._document[found] * len(known) + at[found])
        return np.bincount(pairs // len(known), minlength=len(self.size))


def _runs(positions: Array) -> tuple[Array, Array]:
    """Begin and end of each run of positions that follow each other."""
    first = np.flatnonzero(np.diff(positions, prepend=-2) > 1)
    return positions[first], positions[np.append(first[1:], len(positions)) - 1] + 1 if len(positions) else positions


def _joined(letters: Array, space: Array) -> Array:
    """Which characters belong to a word: letters, digits, and the marks between two of them that no space parts. The
    first and the last character are spaces."""
    marks = np.flatnonzero(~(letters | space))
    begins, ends = _runs(marks)
    within = letters[begins - 1] & letters[ends]
    joined = letters.copy()
    joined[marks] = np.repeat(within, ends - begins)
    return joined


def _grouped(hashes: Array, document: Array) -> tuple[Array, Array]:
    """An order in which equal hashes of one document stand together, and where each group begins."""
    keys = hashes ^ _mixed(document.astype(np.uint64) + np.uint64(1))
    order = np.argsort(keys)
    ranked = keys[order]
    return order, np.flatnonzero(np.concatenate([[True], ranked[1:] != ranked[:-1]]))


def _again(hashes: Array, document: Array) -> Array:
    """Which hashes occur before in the same document."""
    if not len(hashes):
        return np.zeros(0, bool)
    order, starts = _grouped(hashes, document)
    again = np.ones(len(hashes), bool)
    again[np.minimum.reduceat(order, starts)] = False
    return again


def _without_overlap(hashes: list[int], sizes: list[int], later: list[int], n: int) -> int:
    """Sizes of the n-grams that occur before; the next that counts begins after one that did. Only those at `later`
    occur before at all."""
    seen: set[int] = set()
    total = at = 0
    for position in later:
        if position < at:
            continue
        seen.update(hashes[at:position])
        at = position
        if hashes[position] in seen:
            total += sizes[position]
            at += n
        else:
            seen.add(hashes[position])
            at += 1
    return total
