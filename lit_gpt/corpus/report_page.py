"""report.html of a corpus: what came in, what each rule took, measures with their limits, samples of removed text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from lit_gpt.report.blocks import Block, Details, Headline, Sample, Shares, Table, Text
from lit_gpt.report.numbers import duration, short, size
from lit_gpt.report.page import Page
from lit_gpt.report.plots import Histogram, Mark

_SOURCES = 30


def write_page(path: Path, stats: dict[str, Any], sources: list[tuple[str, int]], elapsed_s: float) -> None:
    """sources: name and bytes as stored of each file; elapsed_s: from the first start of the build to its end."""
    page = Page(f"Corpus {path.parent.name}", f"{stats['documents']:,} documents in, {stats['kept_documents']:,} out")
    page.add("At a glance", _headline(stats, elapsed_s), _bytes(stats))
    page.add("Rules", _rules(stats), note="What each rule took, in the ledger's words; `why ID` asks for one document.")
    if dedup := stats["paragraph_dedup"]:
        page.add("Paragraph deduplication", *_dedup(stats, dedup))
    page.add("Measures", *_histograms(stats), note="Values of all documents that reached a stage, and its limits.")
    page.add("Removed text", *_samples(stats), note="For each rule a few texts, chosen by a hash.")
    page.add("Sources", _sources(sources))
    page.write(path)


def _headline(stats: dict[str, Any], elapsed_s: float) -> Block:
    kept = stats["kept_text_bytes"] / max(stats["text_bytes"], 1)
    values: dict[str, object] = {
        "documents kept": f"{stats['kept_documents'] / max(stats['documents'], 1):.1%}",
        "text kept": f"{kept:.1%}",
        "text in": size(stats["text_bytes"]),
        "text out": size(stats["kept_text_bytes"]),
    }
    if stats["tokens_per_byte"]:
        values["tokens out (about)"] = short(stats["kept_text_bytes"] * stats["tokens_per_byte"])
    values["lines rejected"] = sum(stats["rejects"].values())
    values["first start to end"] = duration(elapsed_s)
    values["text a second"] = size(stats["text_bytes"] / max(elapsed_s, 1e-9))
    return Headline(values)


def _bytes(stats: dict[str, Any]) -> Block:
    """The text by what became of it; documents that fell count with all that they had."""
    parts = {"kept": float(stats["kept_text_bytes"])}
    for rule in stats["rules"]:
        if rule["documents"] or rule["paragraphs"]:
            parts[rule["stage"]] = parts.get(rule["stage"], 0.0) + rule["bytes"]
    return Shares("Bytes of text", parts, shown={name: size(amount) for name, amount in parts.items()})


def _rules(stats: dict[str, Any]) -> Block:
    rate = stats["tokens_per_byte"]
    rows = [
        (
            rule["stage"], rule["rule"], rule["threshold"], rule["documents"], rule["paragraphs"], rule["masks"],
            rule["bytes"], round(rule["bytes"] * rate) if rate else None,
        )
        for rule in stats["rules"]
    ]  # fmt: skip
    columns = ("stage", "rule", "limit", "documents", "paragraphs", "masks", "bytes", "tokens (about)")
    return Table(columns, rows)


def _dedup(stats: dict[str, Any], dedup: dict[str, Any]) -> list[Block]:
    lost, twice = dedup["vanished_texts"] + dedup.get("lost_later", 0), dedup.get("kept_twice", 0)
    said = f"Fates were settled in {dedup['rounds']} rounds; {lost} texts are in no document any more."
    if twice:
        said += f" {twice} documents that a later stage had removed in a round before may repeat others' texts."
    blocks: list[Block] = [Text(said, "warning" if lost else "plain")]
    if most := dedup.get("most_repeated"):
        rows = [(one["copies"], one["text"], one["document_id"], one["paragraph"]) for one in most]
        blocks.append(Table(("copies", "text", "first in", "paragraph"), rows, "Most repeated paragraphs"))
    return blocks


def _histograms(stats: dict[str, Any]) -> list[Block]:
    limits: dict[str, list[Mark]] = {}
    for rule in stats["rules"]:
        if rule["threshold"] is not None:
            measure = rule["rule"].removeprefix("min_").removeprefix("max_")
            limits.setdefault(measure, []).append(Mark(rule["threshold"], f"{rule['rule']} {rule['threshold']:g}"))
    return [
        Histogram(
            name, np.linspace(0, one["highest"], len(one["counts"]) + 1), {"documents": one["counts"]}, name,
            thresholds=[mark for mark in limits.get(name, []) if isinstance(mark.x, int | float)
                        and mark.x <= one["highest"]],
            log_y=True, note="The last bar holds all that lies beyond.",
        )
        for name, one in stats["histograms"].items()
    ]  # fmt: skip


def _samples(stats: dict[str, Any]) -> list[Block]:
    return [
        Details(f"{rule} ({len(held)})", _Samples([
            Sample(" ".join(filter(None, (one["document_id"], one["value"]))), one["text"]) for one in held
        ]))
        for rule, held in stats["samples"].items()
    ]  # fmt: skip


class _Samples:
    """Several samples as one block."""

    def __init__(self, samples: list[Sample]) -> None:
        self._samples = samples

    def html(self, data: list[dict[str, Any]]) -> str:
        return "".join(sample.html(data) for sample in self._samples)


def _sources(sources: list[tuple[str, int]]) -> Block:
    rows: list[tuple[object, ...]] = [(name, size(number)) for name, number in sources[:_SOURCES]]
    if len(sources) > _SOURCES:
        rest = sources[_SOURCES:]
        rows.append((f"{len(rest)} more", size(sum(number for _, number in rest))))
    return Table(("file", "as stored"), rows)
