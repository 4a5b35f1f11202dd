"""What a page is made of, apart from plots: tables, headline figures, shares of a whole, texts.

Every text is escaped here, so a document or a sample cannot change the page.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

Kind: TypeAlias = Literal["plain", "good", "warning", "bad"]
LONG_CHARACTERS = 60
"""A cell with more keeps a width at which it can be read, also on a telephone."""


class Block(Protocol):
    """A part of a page."""

    def html(self, data: list[dict[str, Any]]) -> str:
        """The block's HTML; what its script draws is appended to `data`, and the HTML names its place there."""
        ...


class Cell(NamedTuple):
    """A value of a table or a headline with more than its text."""

    value: object
    kind: Kind = "plain"
    title: str = ""
    """Shown when the pointer rests on it."""
    code: bool = False
    """In a font of fixed width: hashes, paths, commands."""
    link: str = ""
    """A path or address that the text leads to."""


class Group(NamedTuple):
    """Blocks as one."""

    blocks: Sequence[Block]

    def html(self, data: list[dict[str, Any]]) -> str:
        return "".join(block.html(data) for block in self.blocks)


class Details(NamedTuple):
    """A block that is folded until a click; it is printed open."""

    summary: str
    block: Block

    def html(self, data: list[dict[str, Any]]) -> str:
        return f"<details><summary>{escape(self.summary)}</summary>{self.block.html(data)}</details>"


class Text(NamedTuple):
    """A paragraph."""

    text: str
    kind: Kind = "plain"

    def html(self, data: list[dict[str, Any]]) -> str:
        return f'<p class="{self.kind}">{escape(self.text)}</p>'


class Sample(NamedTuple):
    """A text as it is, such as a document or what a model wrote, below a line that says what it is."""

    heading: str
    text: str
    begins: str = ""
    """What stands before the text, set off from it: a prompt."""

    def html(self, data: list[dict[str, Any]]) -> str:
        begins = f"<b>{escape(self.begins)}</b>" if self.begins else ""
        return f'<div class="sample"><h4>{escape(self.heading)}</h4><pre>{begins}{escape(self.text)}</pre></div>'


@dataclass(frozen=True)
class Headline:
    """The few values that say most, large: name -> value, or Cell."""

    values: Mapping[str, object]

    def html(self, data: list[dict[str, Any]]) -> str:
        def tile(name: str, value: object) -> str:
            cell = as_cell(value)
            note = f"<small>{escape(cell.title)}</small>" if cell.title else ""
            return f'<div class="{cell.kind}"><dt>{escape(name)}</dt><dd>{shown(cell.value)}{note}</dd></div>'

        return f'<dl class="headline">{"".join(tile(*item) for item in self.values.items())}</dl>'


@dataclass(frozen=True)
class Table:
    """Rows of values. Numbers stand to the right; None and "" are a dash. Scrolls sideways where it is too wide."""

    columns: Sequence[str]
    """Headings; none for a table of names and values."""
    rows: Sequence[Sequence[object]]
    """Each value a str, a number, None or a Cell."""
    caption: str = ""

    def html(self, data: list[dict[str, Any]]) -> str:
        note = f'<p class="note">{escape(self.caption)}</p>' if self.caption else ""  # a caption would scroll sideways
        right = [any(_is_number(row[at]) for row in self.rows) for at in range(len(self.columns))]
        heads = zip(self.columns, right, strict=True)
        head = "".join(f"<th{' class=number' if number else ''}>{escape(name)}</th>" for name, number in heads)
        head = f"<thead><tr>{head}</tr></thead>" if self.columns else ""
        body = "".join(f"<tr>{''.join(map(_table_cell, row))}</tr>" for row in self.rows)
        kind = "" if self.columns else ' class="facts"'
        return f'{note}<div class="wide"><table{kind}>{head}<tbody>{body}</tbody></table></div>'


def facts(values: Mapping[str, object], caption: str = "") -> Table:
    """A table of names and values."""
    return Table((), list(values.items()), caption)


@dataclass(frozen=True)
class Shares:
    """Parts of a whole as one bar with a legend: name -> amount, in `unit`."""

    title: str
    parts: Mapping[str, float]
    unit: str = ""
    shown: Mapping[str, str] | None = None
    """name -> how its amount is written; default: the number and the unit."""

    def html(self, data: list[dict[str, Any]]) -> str:
        whole = sum(self.parts.values()) or 1.0
        bar, legend = "", ""
        for number, (name, amount) in enumerate(self.parts.items()):
            written = (self.shown or {}).get(name) or f"{number_text(amount)} {self.unit}".strip()
            said = f"{escape(name)}: {amount / whole:.1%} ({escape(written)})"
            colour = f"background:var(--c{number % COLOURS})"
            bar += f'<i style="flex:{amount / whole:.6f};{colour}" title="{said}"></i>'
            legend += f'<li><i style="{colour}"></i>{said}</li>'
        return (
            f'<figure class="shares"><figcaption>{escape(self.title)}</figcaption>'
            f'<div class="bar" role="img" aria-label="{escape(self.title)}">{bar}</div><ul>{legend}</ul></figure>'
        )


COLOURS = 8
"""Colours of series and shares, --c0 to --c7 in page.css; more begin again."""


def escape(text: object) -> str:
    return html.escape(str(text), quote=True)


def as_cell(value: object) -> Cell:
    return value if isinstance(value, Cell) else Cell(value)


def shown(value: object) -> str:
    """A value as HTML: numbers with separators, None as a dash."""
    if value is None or value == "":
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return escape(number_text(value) if isinstance(value, (int, float)) else value)


def number_text(value: float) -> str:
    """An int in full; a float with six digits."""
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"


def _is_number(value: object) -> bool:
    inner = as_cell(value).value
    return isinstance(inner, (int, float)) and not isinstance(inner, bool)


def _table_cell(value: object) -> str:
    cell = as_cell(value)
    names = [cell.kind] * (cell.kind != "plain") + ["number"] * _is_number(cell)
    text = shown(cell.value)
    names += ["long"] * (len(text) > LONG_CHARACTERS and not cell.code)
    text = f"<code>{text}</code>" if cell.code else text
    text = f'<a href="{escape(cell.link)}">{text}</a>' if cell.link else text
    title = f' title="{escape(cell.title)}"' if cell.title else ""
    return f"<td{f' class={chr(34)}' + ' '.join(names) + chr(34) if names else ''}{title}>{text}</td>"
