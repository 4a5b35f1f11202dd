"""The shell of every report: one HTML file that needs nothing else, for screens light and dark, phones and paper.

    page = Page("LLaMmlein_1B", "out/LLaMmlein_1B, 12,000 steps")
    page.add("Losses", Headline({"loss": 2.61}), Plot("loss", [Line("train", steps, losses)]))
    page.add("Sources", Table(("source", "documents"), [("wiki", 1200)]), note="One line below the heading.")
    page.write(run_dir / "report.html")

Blocks: blocks.py (Headline, Table, facts, Shares, Text, Sample, Details) and plots.py (Plot with Line and Mark,
Histogram with thresholds). uPlot 1.6.32 (assets/, MIT) draws the plots; docs/architecture.md says why it.

Invariants: the file asks no network for anything, and its policy says so to the browser; what it shows is escaped.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from lit_gpt.files import publish
from lit_gpt.report.blocks import Block, escape

ASSETS = Path(__file__).parent / "assets"
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'"
)
"""What a browser lets the page do: run and show what is in it, and ask the server that it came from, if any."""


class _Section(NamedTuple):
    heading: str
    note: str
    blocks: tuple[Block, ...]


class Page:
    """A page under construction; `html` may be called once or often."""

    def __init__(self, title: str, subtitle: str = "", *, live_s: float = 0) -> None:
        """live_s: seconds after which a page that a server gave looks for a newer one; 0: never."""
        self._title, self._subtitle = title, subtitle
        self._live = f' data-live="{live_s:g}"' if live_s else ""
        self._sections: list[_Section] = []

    def add(self, heading: str, *blocks: Block | None, note: str = "") -> None:
        """Add a section; None is left out, and so is a section without blocks and note."""
        present = tuple(block for block in blocks if block is not None)
        if present or note:
            self._sections.append(_Section(heading, note, present))

    def html(self) -> str:
        data: list[dict[str, Any]] = []
        body, links = "", ""
        for number, section in enumerate(self._sections):
            note = f"<p class=note>{escape(section.note)}</p>" if section.note else ""
            blocks = "".join(block.html(data) for block in section.blocks)
            body += f'<section id="s{number}"><h2>{escape(section.heading)}</h2>{note}{blocks}</section>'
            links += f'<a href="#s{number}">{escape(section.heading)}</a>'
        return (
            f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(self._title)}</title>'
            '<meta name="viewport" content="width=device-width,initial-scale=1">'
            '<meta name="referrer" content="no-referrer">'
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}"><link rel="icon" href="data:,">'
            f"<style>{_asset('uPlot-1.6.32.min.css')}{_asset('page.css')}</style></head><body{self._live}><header>"
            f'<div><h1>{escape(self._title)}</h1><p class="note">{escape(self._subtitle)}</p></div>'
            '<div id="controls"></div></header>'
            f"<nav>{links}</nav><main>{body}"
            "<noscript><p class=bad>The plots are drawn by a script, which this browser does not run.</p></noscript>"
            f'<script type="application/json" id="data">{_json(data)}</script></main>'
            f"<script>/*! uPlot 1.6.32, MIT licence, (c) Leon Sorokin\n{_licence()}*/\n"
            f"{_asset('uPlot-1.6.32.min.js')}</script><script>{_asset('page.js')}</script></body></html>\n"
        )

    def write(self, path: Path) -> int:
        """Publish the page; returns its size in bytes."""
        content = self.html().encode()
        publish(path, [content])
        return len(content)


def _asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")


def _licence() -> str:
    return _asset("uPlot-LICENSE").replace("*/", "")


def _json(data: list[dict[str, Any]]) -> str:
    """JSON that may stand inside a script element."""
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
