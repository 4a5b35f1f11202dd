"""Words and white space of lines, counted for many documents at once.

A word is a run of letters and digits by Unicode (str.isalnum, as \\w of `re` without "_").
Costs: about 5 ns a character.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

_WORD, _SPACE, _NEWLINE = 1, 2, 3
_BITS = 21
"""Of a count of characters; three make a number. Only single documents have 2 ** 21 characters or more."""


class Lines(NamedTuple):
    """Of each line of a text."""

    words: npt.NDArray[np.int64]
    blank: npt.NDArray[np.bool_]
    tidy: npt.NDArray[np.bool_]
    """Whether " ".join(line.split()) is the line itself."""


@functools.cache
def _kinds() -> npt.NDArray[np.uint8]:
    """What each character is."""
    kinds = np.zeros(sys.maxunicode + 1, np.uint8)
    mark(kinds, r"[^\W_]+", _WORD)
    mark(kinds, r"\s+", _SPACE)
    kinds[ord("\n")] = _NEWLINE
    return kinds


def mark(table: npt.NDArray[np.uint8], pattern: str, value: int) -> None:
    """Set the entries of all characters that match the pattern; some 20 ms, where asking each character takes 200."""
    for match in re.finditer(pattern, "".join(map(chr, range(len(table))))):
        table[match.start() : match.end()] = value


def _characters(text: str) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint8]]:
    """The characters of "\n" + text + "\n", and what they are."""
    codes = np.frombuffer(f"\n{text}\n".encode("utf-32-le"), np.uint32)
    return codes, _kinds()[codes]


def _begins(kinds: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
    """Where words begin, from the second character on."""
    words = kinds == _WORD
    return words[1:] & ~words[:-1]


def count_words(text: str) -> int:
    return int(np.count_nonzero(_begins(_characters(text)[1])))


def count_lines(text: str) -> Lines:
    """The lines of `text`, split at "\n"."""
    codes, kinds = _characters(text)
    newlines = kinds == _NEWLINE
    ends = np.flatnonzero(newlines)
    space = kinds == _SPACE
    seam = space | newlines  # white space beside it is no single space between words
    untidy = np.zeros(len(codes), bool)
    untidy[1:-1] = space[1:-1] & ((codes[1:-1] != 0x20) | seam[:-2] | newlines[2:])

    begins = np.zeros(len(codes), bool)
    begins[1:] = _begins(kinds)
    words, solid, wrong = _sums(begins, ~seam, untidy, ends)
    return Lines(words, solid == 0, (wrong == 0) & (solid > 0))


def _sums(
    first: npt.NDArray[np.bool_], second: npt.NDArray[np.bool_], third: npt.NDArray[np.bool_],
    ends: npt.NDArray[np.int64],
) -> Iterator[npt.NDArray[np.int64]]:  # fmt: skip
    """How often each flag is set between two ends. Three counts fit into one number, which is summed once."""
    if len(first) >> _BITS:
        return (np.diff(np.cumsum(flags)[ends]) for flags in (first, second, third))
    packed = first | second.astype(np.int64) << _BITS | third.astype(np.int64) << 2 * _BITS
    counts = np.diff(np.cumsum(packed)[ends])
    return (counts >> shift & (1 << _BITS) - 1 for shift in (0, _BITS, 2 * _BITS))
