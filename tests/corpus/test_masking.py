"""E-mail addresses are found as by datatrove's pattern alone, in a time that grows with the text only."""

from __future__ import annotations

import random

import pytest
from datatrove.pipeline.formatters.pii import PIIFormatter

from lit_gpt.corpus.masking import _addresses

PATTERN = PIIFormatter().emails_replacer.regex
PIECES = ["a", "Z9", ".", "-", "+", "@", "@", "b.de", "x@y.org", " ", "\n", "@[10.0.0.1]", "ä", "_", "c-d.co.uk", ".."]


def test_what_is_found_is_what_the_pattern_finds() -> None:
    generator = random.Random(1)
    found = 0
    for _ in range(4000):
        text = "".join(generator.choices(PIECES, k=generator.randint(1, 30)))
        spans = [match.span() for match in PATTERN.finditer(text)]
        assert [match.span() for match in _addresses(PATTERN, text)] == spans, text
        found += len(spans)
    assert found > 1000


@pytest.mark.timeout(60)
def test_a_line_of_letters_and_dots_without_end() -> None:
    """The pattern alone takes the square of its length: more than 25 s for 80 kB."""
    text = "a.b-" * 250_000 + "@ und an " + "x." * 100 + "y@example.org"
    assert [match[0][-13:] for match in _addresses(PATTERN, text)] == ["y@example.org"]
    assert list(_addresses(PATTERN, "a@" * 200_000 + "-" * 100_000)) == []
