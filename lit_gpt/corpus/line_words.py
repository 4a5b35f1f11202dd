"""Words and white space of lines, counted for many documents at once.

A word is a run of letters and digits by Unicode (str.isalnum, as \\w of `re` without "_").
Costs: about 5 ns a character.
"""

from __future__ import annotations

import functools
import sys
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

_WORD, _SPACE, _NEWLINE = 1, 2, 3


class Lines(NamedTuple):
    """Of each line of a text."""

    words: npt.NDArray[np.int64]
    blank: npt.NDArray[np.bool_]
    tidy: npt.NDArray[np.bool_]
    """Whether " ".join(line.split()) is the line itself."""


@functools.cache
def _kinds() -> npt.NDArray[np.uint8]:
    """What each character is. Made in some 0.2 s."""
    kinds = np.zeros(sys.maxunicode + 1, np.uint8)
    letters = [chr(code).isalnum() for code in range(sys.maxunicode + 1)]
    kinds[np.array(letters)] = _WORD
    kinds[[code for code in range(0x3001) if chr(code).isspace()]] = _SPACE
    kinds[ord("\n")] = _NEWLINE
    return kinds


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

    def per_line(flags: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
        return np.diff(np.cumsum(flags)[ends])

    begins = np.zeros(len(codes), bool)
    begins[1:] = _begins(kinds)
    blank = per_line(~seam) == 0
    return Lines(per_line(begins), blank, (per_line(untidy) == 0) & ~blank)
