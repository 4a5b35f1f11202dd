"""The last job of a build: rejects.jsonl, stats.json and MANIFEST.json out of what the parts left."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datatrove.pipeline.base import PipelineStep

from lit_gpt.corpus.ledger import ledger_files
from lit_gpt.corpus.parts import Layout
from lit_gpt.corpus.report_page import write_page
from lit_gpt.corpus.task import SAMPLES
from lit_gpt.files import publish, write_json, xxh3
from lit_gpt.prepare.reject_guard import ListedReject, refuse_rejects

MANIFEST = "MANIFEST.json"
REJECTS = "rejects.jsonl"
FORMAT = 1


class FinishStep(PipelineStep):
    name = "finish"
    type = "end"

    def __init__(self, layout: Layout, parts: int, max_reject_fraction: float) -> None:
        super().__init__()
        self._layout, self._parts, self._max_reject_fraction = layout, parts, max_reject_fraction

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        layout = self._layout
        check_rejects(layout, self._parts, self._max_reject_fraction)
        stats = statistics(layout, self._parts)
        write_json(layout.root / "stats.json", stats)
        request = json.loads((layout.work / "request.json").read_bytes())
        elapsed_s = time.time() - (layout.work / "request.json").stat().st_mtime
        sources = [(name, size) for _, name, size, *_ in request["sources"]]
        write_page(layout.root / "report.html", stats, sources, elapsed_s)
        paths = [
            path for folder in ("documents", "removed", "ids") for path in sorted((layout.root / folder).iterdir())
        ]
        paths += [layout.root / name for name in (REJECTS, "stats.json")]
        files = {
            path.relative_to(layout.root).as_posix(): {"bytes": path.stat().st_size, "xxh3": xxh3(path)}
            for path in paths
        }
        write_json(layout.root / MANIFEST, {"format": FORMAT, "request": request, "files": files})
        yield from ()


def counts_of(layout: Layout, parts: int) -> list[dict[str, Any]]:
    """What each pass counted, over all parts."""
    found = []
    for number in range(len(list(layout.work.glob("pass-*")))):
        counts: Counter[str] = Counter()
        histograms: dict[str, Any] = {}
        samples: dict[str, list[Any]] = {}
        rejects: list[Any] = []
        most: list[Any] = []
        for part in range(parts):
            one = json.loads(layout.of_pass(number, "counts.json", part).read_bytes())
            counts.update(one["counts"])
            rejects += one["rejects"]
            most += one["most"]
            for name, histogram in one["histograms"].items():
                held = histograms.setdefault(name, {**histogram, "counts": [0] * len(histogram["counts"])})
                held["counts"] = [a + b for a, b in zip(held["counts"], histogram["counts"], strict=True)]
            for rule, held in one["samples"].items():
                samples[rule] = sorted([*samples.get(rule, []), *held])[:SAMPLES]
        found.append({"counts": counts, "histograms": histograms, "samples": samples, "rejects": rejects, "most": most})
    return found


def check_rejects(layout: Layout, parts: int, max_reject_fraction: float) -> None:
    """Write rejects.jsonl; raises BadInput if too many lines were rejected."""
    lines, rejects = 0, []
    for part in range(parts):
        one = json.loads(layout.of_pass(0, "counts.json", part).read_bytes())
        lines += one["counts"].get("lines", 0)
        rejects += [ListedReject(*reject) for reject in one["rejects"]]
    listing = layout.root / REJECTS
    publish(listing, (json.dumps(reject._asdict(), ensure_ascii=False).encode() + b"\n" for reject in rejects))
    if rejects:
        kinds = Counter(reject.kind for reject in rejects)
        refuse_rejects(lines, kinds, rejects[0], max_reject_fraction, listing)


def statistics(layout: Layout, parts: int) -> dict[str, Any]:
    """stats.json: what came in, what each rule took, what is left."""
    passes = counts_of(layout, parts)
    first, last = passes[0], passes[-1]
    tokens = sum(one["counts"]["tokens"] for one in passes)
    token_bytes = sum(one["counts"]["token_text_bytes"] for one in passes)
    found = [layout.work / name for name in ("dedup.json", "review.json")]
    dedup = {name: value for path in found if path.exists() for name, value in json.loads(path.read_bytes()).items()}
    if most := [one for held in passes for one in held["most"]]:
        dedup["most_repeated"] = sorted(most, key=lambda one: (-one["copies"], one["document_id"], one["paragraph"]))
    return {
        "lines": first["counts"]["lines"],
        "rejects": dict(sorted(Counter(reject[2] for reject in first["rejects"]).items())),
        "documents": first["counts"]["documents"],
        "text_bytes": first["counts"]["bytes"],
        "kept_documents": last["counts"]["kept_documents"],
        "kept_text_bytes": last["counts"]["kept_bytes"],
        "tokens_per_byte": tokens / token_bytes if token_bytes else None,
        "rules": rules(layout),
        "paragraph_dedup": dedup or None,
        "histograms": {name: one for found in passes for name, one in found["histograms"].items()},
        "samples": {
            rule: [{"document_id": id, "value": value, "text": text} for _, id, value, text in held]
            for found in passes for rule, held in sorted(found["samples"].items())
        },
    }  # fmt: skip


def rules(layout: Layout) -> list[dict[str, Any]]:
    """For each rule: stage, rule, threshold, and the documents, paragraphs, masks and bytes that it took."""
    totals: Counter[tuple[str, str, str, str]] = Counter()
    thresholds: dict[tuple[str, str], float | None] = {}
    columns = ["stage", "rule", "threshold", "paragraph", "replacement", "length_bytes"]
    for path in ledger_files(layout.root):
        with open(path, "rb") as file:
            table = pq.read_table(file, columns=columns)
        kind = pc.if_else(
            pc.is_valid(table["replacement"]), "masks",
            pc.if_else(pc.is_valid(table["paragraph"]), "paragraphs", "documents"),
        )  # fmt: skip
        table = pa.table(
            {
                "stage": table["stage"].cast(pa.string()), "rule": table["rule"].cast(pa.string()),
                "threshold": table["threshold"], "kind": kind, "bytes": table["length_bytes"],
            }
        )  # fmt: skip
        grouped = table.group_by(["stage", "rule", "threshold", "kind"]).aggregate(
            [("bytes", "sum"), ("bytes", "count")]
        )
        for row in grouped.to_pylist():
            stage, rule, kind = row["stage"], row["rule"], row["kind"]
            thresholds[stage, rule] = row["threshold"]
            totals[stage, rule, kind, "bytes"] += row["bytes_sum"]
            totals[stage, rule, kind, "count"] += row["bytes_count"]
    return [
        {
            "stage": stage, "rule": rule, "threshold": thresholds[stage, rule],
            **{kind: totals[stage, rule, kind, "count"] for kind in ("documents", "paragraphs", "masks")},
            "bytes": sum(totals[stage, rule, kind, "bytes"] for kind in ("documents", "paragraphs", "masks")),
        }
        for stage, rule in sorted(thresholds)
    ]  # fmt: skip
