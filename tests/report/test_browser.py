"""The pages in a real browser: nothing fails, nothing is asked for, and what is drawn is what the files say.

One Chromium for all pages (tests/support/browser.py); where none can be had, the tests skip and say why.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lit_gpt.report import serve
from lit_gpt.report.run_page import write_report
from lit_gpt.report.serve import ReportServer
from tests.report.test_page import full_page
from tests.support.browser import Browser, find_chromium
from tests.support.run_folder import RecordedRun, killed_and_resumed, rolled_back

pytestmark = pytest.mark.slow
WIDTHS = (1280, 390)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program, why = find_chromium()
    if program is None:
        pytest.skip(why)
    running = Browser(program)
    yield running
    running.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory, german_run: Path) -> dict[str, Path]:
    """Name -> the report of a finished, a killed and resumed, a rolled back, a running and an empty run."""
    folder = tmp_path_factory.mktemp("pages")
    running, empty = RecordedRun(folder / "running"), folder / "empty"
    running.start()
    for step in range(1, 6):
        running.step(step, loss=float(step))
    empty.mkdir()
    runs = {
        "finished": german_run, "resumed": killed_and_resumed(folder / "resumed"), "running": running.folder,
        "rolled back": rolled_back(folder / "rolled"), "empty": empty,
    }  # fmt: skip
    for name, run in runs.items():
        write_report([run], folder / f"{name}.html")
    write_report([runs["resumed"], runs["rolled back"]], folder / "several.html")
    running.end()
    return {name: folder / f"{name}.html" for name in (*runs, "several")}


def points(browser: Browser, title: str, series: int) -> list[list[Any]]:
    """What uPlot holds of a series of the plot with this title: [x, y] pairs."""
    found = browser.evaluate(
        f"(() => {{ const p = report.plots().find(p => p.spec.title === {json.dumps(title)});"
        f" return JSON.stringify([p.u.data[0], p.u.data[{series}]]); }})()"
    )
    x, y = json.loads(found)
    return [[at, value] for at, value in zip(x, y, strict=True) if value is not None]


@pytest.mark.parametrize("name", ["finished", "resumed", "running", "rolled back", "empty", "several"])
def test_a_page_opens_without_fault_on_a_screen_and_a_phone(
    browser: Browser, pages: dict[str, Path], name: str, tmp_path: Path
) -> None:
    for width in WIDTHS:
        browser.open(pages[name].as_uri(), width, dark=width == 390)
        assert browser.faults() == []
        assert browser.requests() == [pages[name].as_uri()]
        assert browser.evaluate("document.documentElement.scrollWidth") == width, "it scrolls sideways"
        notes = "[...document.querySelectorAll('.note, caption')].map(note => note.getBoundingClientRect().right)"
        assert max(browser.evaluate(notes), default=0) <= width, "a note is cut"
        drawn = browser.evaluate("report.plots().every(p => p.u.width === p.holder.clientWidth && p.u.width > 250)")
        assert drawn
        browser.screenshot(tmp_path / f"{width}.png")
        assert (tmp_path / f"{width}.png").stat().st_size > 10_000
    assert browser.evaluate("document.querySelectorAll('canvas').length") in ([0] if name == "empty" else range(5, 12))


def test_what_is_drawn_is_what_metrics_csv_says(browser: Browser, pages: dict[str, Path], german_run: Path) -> None:
    lines = (german_run / "metrics.csv").read_text().splitlines()
    header = lines[0].split(",")
    rows = [dict(zip(header, line.split(","), strict=True)) for line in lines[1:]]
    browser.open(pages["finished"].as_uri())
    drawn = points(browser, "loss, nats a target", 1)
    assert [x for x, _ in drawn] == [int(row["step"]) for row in rows]
    assert [y for _, y in drawn] == pytest.approx([float(row["loss"]) for row in rows], rel=1e-6)
    validated = points(browser, "loss, nats a target", 2)
    assert [x for x, _ in validated] == [int(row["step"]) for row in rows if row["val_loss"]]
    text = browser.evaluate("document.querySelector('dl.headline').innerText")
    assert f"{float(rows[-1]['loss']):.4f}" in text
    assert f"{int(rows[-1]['tokens']):,}" in text


def test_the_axis_can_be_chosen(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["resumed"].as_uri())
    choose = "[...document.querySelectorAll('#controls button')].find(b => b.textContent === 'tokens').click()"
    browser.evaluate(choose)
    assert points(browser, "loss, nats a target", 1)[-1] == [20_000, 4]
    assert browser.faults() == []


def test_the_pointer_explains_a_mark_and_reads_values(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["resumed"].as_uri())
    browser.evaluate(
        "(() => { const p = report.plots()[0]; p.u.setCursor({left: p.u.valToPos(10, 'x'), top: 20}); })()"
    )
    assert "restart, after step 10 of start 0" in browser.evaluate("document.querySelector('.mark').textContent")
    legend = browser.evaluate("document.querySelector('.u-legend').innerText")
    assert re.search(r"training:?\s*7\.75", legend), legend  # 9 - 10 / 8


def test_colours_follow_the_button(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["resumed"].as_uri())
    paper = "getComputedStyle(document.body).backgroundColor"
    assert browser.evaluate(paper) == "rgb(255, 255, 255)"
    browser.evaluate("[...document.querySelectorAll('#controls button')].at(-1).click()")
    assert browser.evaluate(paper) == "rgb(20, 23, 28)"
    assert browser.faults() == []


def test_it_prints(browser: Browser, pages: dict[str, Path], tmp_path: Path) -> None:
    """Folded parts are open on paper, in light colours, and plots fit the paper; afterwards all is as before."""
    browser.open(pages["resumed"].as_uri(), dark=True)
    seen = (
        "[document.querySelectorAll('details:not([open])').length, Math.max(...report.plots().map(p => p.u.width)), "
        "getComputedStyle(document.body).backgroundColor]"
    )
    browser.evaluate(f"addEventListener('beforeprint', () => {{ window.seen = {seen}; }})")
    browser.pdf(tmp_path / "page.pdf")
    assert browser.evaluate("window.seen") == [0, 680, "rgb(255, 255, 255)"]
    assert browser.evaluate("document.querySelectorAll('details[open]').length") == 0
    assert browser.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 28)"
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")


def test_a_served_page_follows_the_run(browser: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """New steps come without a reload: the choice of the axis and the zoom stay."""
    monkeypatch.setattr(serve, "LOOK_S", 0.1)
    run = RecordedRun(tmp_path / "run")
    run.start()
    for step in range(1, 6):
        run.step(step, loss=float(step))
    with ReportServer([run.folder], 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        browser.open(server.address)
        browser.evaluate("{ const p = report.plots()[0]; p.u.setScale('x', {min: 2, max: 4}); window.mine = 1; }")
        browser.wait_for("document.getElementById('live').textContent === 'live'")
        run.step(6, loss=6.5)
        browser.wait_for("report.plots()[0].spec.series[0].y.at(-1) === 6.5")
        browser.wait_for("report.plots()[0].u.scales.x.max === 4")
        assert browser.evaluate("window.mine") == 1  # it was not loaded again
        assert browser.faults() == []
        assert {address.partition("?")[0] for address in browser.requests()} == {server.address}
        server.shutdown()
    run.end()


def test_every_block_is_drawn_and_hostile_text_runs_nothing(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text(full_page().replace("alert(1)", "window.hacked=1"), encoding="utf-8")
    browser.open(path.as_uri())
    assert browser.faults() == []
    assert browser.evaluate("window.hacked") is None
    assert browser.evaluate("document.querySelectorAll('canvas').length") == 2
