"""The shell of the reports: one file that needs nothing, and cannot be changed by what it shows."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lit_gpt.report.blocks import Cell, Details, Headline, Sample, Shares, Table, Text, facts
from lit_gpt.report.page import ASSETS, Page
from lit_gpt.report.plots import Histogram, Line, Mark, Plot, thinned

HOSTILE = "</script><script>alert(1)</script>\"'&\u2028"


def data_of(text: str) -> Any:
    """What the page's script draws."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert found
    return json.loads(found[1])


def full_page() -> str:
    page = Page(HOSTILE, HOSTILE)
    page.add(
        HOSTILE,
        Headline({HOSTILE: Cell(HOSTILE, "bad", HOSTILE)}),
        Table((HOSTILE, "n"), [(HOSTILE, 1), (Cell(HOSTILE, title=HOSTILE, code=True, link=HOSTILE), None)], HOSTILE),
        facts({HOSTILE: HOSTILE}, HOSTILE),
        Text(HOSTILE),
        Details(HOSTILE, Sample(HOSTILE, HOSTILE, HOSTILE)),
        Shares(HOSTILE, {HOSTILE: 1.0}, HOSTILE),
        Plot(HOSTILE, [Line(HOSTILE, [1, 2], [3, 4])], HOSTILE, HOSTILE, [Mark(1, HOSTILE)], note=HOSTILE),
        Histogram(HOSTILE, [0, 1], {HOSTILE: [5]}, HOSTILE, HOSTILE, [Mark(0.5, HOSTILE)], note=HOSTILE),
        note=HOSTILE,
    )
    return page.html()


def test_what_a_page_shows_cannot_change_it() -> None:
    text, plain = full_page(), Page("").html()
    assert "<script>alert" not in text
    assert text.count("<script") == plain.count("<script") == 3
    assert data_of(text)[0]["title"] == HOSTILE


def test_a_page_asks_no_network_for_anything() -> None:
    """No element names an address, and the browser is told to refuse others."""
    text = full_page()
    outside = re.sub(r"/\*!? ?https?://\S+", "", text)  # the library's own comment says where it is from
    assert not re.search(r"""(src|href|url)\s*[=(]\s*["']?\s*(https?:)?//""", outside)
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', text)
    assert policy
    assert policy[1].startswith("default-src 'none'; ")
    assert "http" not in policy[1]


def test_the_library_is_the_published_one_with_its_licence() -> None:
    """The hashes of uplot 1.6.32 as npm's registry serves it."""
    pinned = {
        "uPlot-1.6.32.min.js": "19c8d4c6ad88929a79f4ae49d6f7161566dfd0ba3d15cc495e974f787eb78f1f",
        "uPlot-1.6.32.min.css": "df630c6a8d6f8eeaff264b50f73ce5b114f646ffd9a0bb74f049b0a00135fa04",
        "uPlot-LICENSE": "8f989229699b4fe2f1a0432d0e9edc338a8a911e250e2d1b01ecd770a5f5b1bd",
    }
    found = {name: hashlib.sha256((ASSETS / name).read_bytes()).hexdigest() for name in pinned}
    assert found == pinned
    text = Page("").html()
    assert (ASSETS / "uPlot-1.6.32.min.js").read_text(encoding="utf-8") in text
    assert "Permission is hereby granted, free of charge" in text


def test_a_section_without_content_is_left_out() -> None:
    page = Page("a run")
    page.add("Nothing", None)
    page.add("A note only", note="no step yet")
    text = page.html()
    assert "<h2>A note only</h2>" in text
    assert "Nothing" not in text


def test_a_page_is_published_whole(tmp_path: Path) -> None:
    page = Page("a run")
    page.add("x", Text("Würzburg"))
    size = page.write(tmp_path / "report.html")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert (tmp_path / "report.html").stat().st_size == size
    assert "Würzburg" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_values_in_a_table() -> None:
    table = Table(("name", "n"), [("a", 1234567), ("b", 0.1), ("c", None), ("d", True), ("e", float("nan"))])
    cells = re.findall(r"<td[^>]*>(.*?)</td>", table.html([]))
    assert cells[1::2] == ["1,234,567", "0.1", "–", "yes", "nan"]


def test_shares_add_up() -> None:
    text = Shares("time", {"steps": 3.0, "saves": 1.0}, "h").html([])
    assert "steps: 75.0% (3 h)" in text
    assert "saves: 25.0% (1 h)" in text
    assert "0.0% (0)" in Shares("nothing", {"x": 0.0}).html([])


# Plots


def test_thinning_loses_no_extreme() -> None:
    """A million values become 2,000, with the spike, the dip, the one that is no number, and both ends."""
    y = np.random.default_rng(1).normal(2.5, 0.01, 1_000_000)
    y[777_777], y[123_456], y[500_000] = 14.0, -3.0, np.nan
    kept = thinned(y, 2000)
    assert len(kept) <= 2001
    assert {0, 123_456, 500_000, 777_777, 999_999} <= set(kept.tolist())
    assert (np.diff(kept) > 0).all()
    for begin in range(0, 1_000_000, 100_000):  # so has each part
        inside = kept[(kept >= begin) & (kept < begin + 100_000)]
        assert np.nanmax(y[inside]) == np.nanmax(y[begin : begin + 100_000])
        assert np.nanmin(y[inside]) == np.nanmin(y[begin : begin + 100_000])


@pytest.mark.parametrize("count", [0, 1, 2, 3, 10, 11, 12, 99, 100, 101])
def test_thinning_of_few(count: int) -> None:
    y = np.arange(count, dtype=float)
    kept = thinned(y, 10)
    assert kept.tolist() == list(range(count)) if count <= 10 else len(kept) <= 10
    assert set(kept.tolist()) >= ({0, count - 1} if count else set())


def test_a_plot_on_two_axes() -> None:
    x = {"step": [10, 20, 30], "tokens": [1e6, 2e6, 3e6]}
    plot = Plot(
        "loss", [Line("train", x, [3.0, float("nan"), 1 / 3])], marks=[Mark({"step": 20, "tokens": 2e6}, "resumed")]
    )
    data: list[dict[str, Any]] = []
    html = plot.html(data)
    assert 'data-plot="0"' in html
    (series,) = data[0]["series"]
    assert series["x"] == {"step": [10, 20, 30], "tokens": [1000000, 2000000, 3000000]}
    assert series["y"] == [3, None, 0.3333333]
    assert data[0]["marks"] == [{"x": {"step": 20.0, "tokens": 2e6}, "label": "resumed", "kind": "plain"}]


def test_infinite_values_are_told() -> None:
    data: list[dict[str, Any]] = []
    html = Plot("norm", [Line("train", [1, 2, 3], [1.0, float("inf"), 2.0])]).html(data)
    assert data[0]["series"][0]["y"] == [1, None, 2]
    assert "train: 1 values are infinite, and not drawn" in html


def test_a_histogram_wants_an_edge_more_than_counts() -> None:
    data: list[dict[str, Any]] = []
    Histogram("length", [0, 1, 10], {"kept": [5, 7]}, "tokens").html(data)
    assert data[0]["series"][0] == {
        "name": "kept", "x": {"tokens": [0, 1, 10]}, "y": [5, 7, 7], "style": "steps", "colour": 0, "thinned": False,
    }  # fmt: skip
    with pytest.raises(ValueError, match="2 edges for 2 counts"):
        Histogram("length", [0, 1], {"kept": [5, 7]}, "tokens").html(data)
