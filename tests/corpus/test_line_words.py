"""Words and white space of lines beside str and re."""

from __future__ import annotations

import random
import re

from lit_gpt.corpus.line_words import count_lines, count_words

CHARACTERS = "aZß9_-.„…× ÷\u00a0\u2003\t\r\x1c\x85\u3000é\u0301٣日𝔘😀Ḁ\ufeff²" + "  \n\n"


def test_lines_are_those_of_str_and_re() -> None:
    for seed in range(1500):
        choice = random.Random(seed)
        text = "".join(choice.choices(CHARACTERS, k=choice.randint(0, 30)))
        found, lines = count_lines(text.encode()), text.split("\n")
        assert found.words.tolist() == [len(re.findall(r"[^\W_]+", line)) for line in lines], text
        assert found.blank.tolist() == [not line.strip() for line in lines], text
        assert found.tidy.tolist() == [bool(line.strip()) and " ".join(line.split()) == line for line in lines], text
        assert count_words(text.encode()) == sum(found.words)
