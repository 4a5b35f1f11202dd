"""The data of a run on its page: sources, mixture asked for and seen, order, and whether the digests were verified."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lit_gpt.cli import BadInput
from lit_gpt.data.order import MIXTURE_PERIOD, Mixture
from lit_gpt.data.token_store import TokenStore
from lit_gpt.report.blocks import Block, Cell, Table, Text, facts
from lit_gpt.report.run_view import RunView


def data_blocks(view: RunView) -> list[Block]:
    """The blocks of the data section; none where the run has no record."""
    if not view.attempts:
        return []
    attempt = view.attempts[-1]
    rows, consumed = _sources(view)
    names = ("packing", "seed", "block_size", "global_batch_size", "cross_document_attention", "order_version")
    table: dict[str, object] = {name: str(attempt.facts[name]) for name in names if name in attempt.facts}
    if view.newest is not None:
        table["rows trained on or left out"] = view.newest.first_slot + view.newest.rows
    if attempt.data_from_step:
        table["data from its start after step"] = attempt.data_from_step
    headings = ("source", "documents", "tokens", "asked", "rows seen", "seen", "data set")
    return [
        Table(headings, rows, "" if consumed else "no step yet"), facts(table, "what the meaning of a row depends on"),
        _verified(view),
    ]  # fmt: skip


def _sources(view: RunView) -> tuple[list[Sequence[object]], int]:
    """A row for each source, and the rows that were seen of all."""
    attempt = view.attempts[-1]
    counts = attempt.facts.get("mixture") or [1]
    folders, ids = attempt.details.get("train_data_dir") or [], attempt.facts.get("datasets") or []
    seen = _seen(view, counts)
    rows: list[Sequence[object]] = []
    for at, share in enumerate(counts):
        folder = folders[at] if at < len(folders) else "?"
        recorded = str(ids[at]) if at < len(ids) else ""
        documents, tokens, state = _store(folder, recorded)
        part = f"{seen[at] / sum(seen):.2%}" if sum(seen) else None
        rows.append((folder, documents, tokens, f"{share / sum(counts):.2%}", seen[at], part, state))
    return rows, sum(seen)


def _seen(view: RunView, counts: Sequence[int]) -> list[int]:
    """Rows of each source that the present data's steps trained on: those before the newest slot, less the left out."""
    if view.newest is None:
        return [0] * len(counts)
    seed = view.attempts[-1].facts.get("seed", 0)
    mixture = Mixture([float(count) for count in counts], seed)
    assert len(counts) == 1 or sum(counts) == MIXTURE_PERIOD  # so that the shares are the recorded ones
    seen = mixture.consumed(view.newest.first_slot + view.newest.rows)
    for begin, end in view.attempts[-1].details.get("left_out", []):
        first, after = mixture.consumed(begin), mixture.consumed(end)
        seen = [total - (later - before) for total, before, later in zip(seen, first, after, strict=True)]
    return seen


def _store(folder: str, recorded: str) -> tuple[int | None, int | None, Cell]:
    """Documents and tokens of a source that is at hand, and how it compares with what the run recorded."""
    try:
        if not Path(folder).is_absolute():  # of a published record, which names no folder
            raise BadInput(folder)
        store = TokenStore.open(Path(folder))
    except BadInput:
        return None, None, Cell(recorded[:16] or "?", title="the data set is not at hand here", code=True)
    if store.dataset_id != recorded:
        return None, None, Cell("changed since", "bad", f"recorded {recorded}, found {store.dataset_id}")
    return (
        store.documents,
        store.tokens,
        Cell(recorded[:16], "good", f"its manifest is the recorded one: {recorded}", True),
    )


def _verified(view: RunView) -> Block:
    found: dict[str, Any] = view.verified
    command = f"python scripts/datapoints.py verify --run_dir {view.folder}"
    if not found:
        return Text(f"Whether the rows of every step are still those of the data was not checked: {command}")
    step, wrong = found.get("steps_to"), found.get("contradictions")
    said = f"datapoints.py verify at {found.get('time')}: {wrong} contradictions up to step {step}"
    if wrong:
        return Text(f"{said}; {command} names them", "bad")
    behind = (
        f"; the {view.step - step:,} steps since were not checked" if isinstance(step, int) and step < view.step else ""
    )
    return Text(f"{said}: every row is what its digest says{behind}", "good")
