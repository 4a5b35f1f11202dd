"""Sorted runs merge to one order, however documents are spread over them; failing workers end the pool."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import lit_gpt.prepare.token_runs
from lit_gpt.cli import BadInput
from lit_gpt.prepare.shard_plan import SplitRule, plan_shards, split_threshold
from lit_gpt.prepare.token_runs import (
    KEY,
    PLACE,
    TOKENS,
    RunSummary,
    TokenisedDocument,
    TokenRun,
    duplicate_places,
    file_and_line,
    find_runs,
    merged,
    open_run,
    place,
    write_run,
)
from lit_gpt.prepare.worker_pool import run_pool


def some_documents(count: int, keys: int, seed: int = 0) -> list[TokenisedDocument]:
    """Random documents; with few `keys`, many share a key and many share an id."""
    random = np.random.default_rng(seed)
    return [
        TokenisedDocument(
            key=int(random.integers(keys)),
            place=place(number % 3, number),
            content=int(random.integers(1 << 63)),
            id_hash=int(random.integers(keys)) << 64 | int(random.integers(3)),
            id=f"d{number}".encode(),
            ids=np.arange(1 + number % 7, dtype="<u2"),
            text_bytes=number,
        )
        for number in range(count)
    ]


def in_runs(folder: Path, documents: list[TokenisedDocument], runs: int) -> list[TokenRun]:
    folder.mkdir()
    for run in range(runs):
        write_run(folder, f"run{run}", documents[run::runs], RunSummary([(0, run)], 0, 0, 0, 0, []))
    return [open_run(path) for path in find_runs(folder)]


@pytest.mark.parametrize("range_documents", [1, 7, 64, 1 << 20])
@pytest.mark.parametrize("keys", [1, 20, 1 << 62])
def test_merged_is_sorted_and_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, range_documents: int, keys: int
) -> None:
    monkeypatch.setattr(lit_gpt.prepare.token_runs, "MERGE_DOCUMENTS", range_documents)
    documents = some_documents(500, keys)
    parts = list(merged([run.documents for run in in_runs(tmp_path / "runs", documents, 4)]))
    found = [pair for part in parts for pair in zip(part[KEY].tolist(), part[PLACE].tolist(), strict=True)]
    assert found == sorted((document.key, document.place) for document in documents)
    if keys > 500 and range_documents < 100:
        assert len(parts) > 4


@pytest.mark.parametrize("range_documents", [5, 1 << 20])
def test_duplicates_are_all_but_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, range_documents: int
) -> None:
    monkeypatch.setattr(lit_gpt.prepare.token_runs, "MERGE_DOCUMENTS", range_documents)
    documents = some_documents(300, 40)
    first: dict[int, int] = {}
    expected = []
    for document in sorted(documents, key=lambda document: document.place):
        if document.id_hash in first:
            expected.append([document.place, first[document.id_hash]])
        first.setdefault(document.id_hash, document.place)
    assert len(expected) > 100
    assert duplicate_places(in_runs(tmp_path / "runs", documents, 3)).T.tolist() == expected


@pytest.mark.parametrize("range_documents", [3, 50, 1 << 20])
def test_plan_equals_cutting_the_sorted_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, range_documents: int
) -> None:
    """Shards of at most 20 tokens, of documents of 1 to 7, cut one by one in order."""
    monkeypatch.setattr(lit_gpt.prepare.token_runs, "MERGE_DOCUMENTS", range_documents)
    documents = some_documents(400, 1 << 62)
    runs = in_runs(tmp_path / "runs", documents, 5)
    left_out = np.array(sorted(document.place for document in documents[::9]), np.uint64)
    threshold = split_threshold(runs, left_out, 0.2)
    plans = plan_shards(runs, SplitRule(threshold, left_out), 20)
    for split, plan in plans.items():
        shards: list[list[int]] = [[]]
        for document in sorted(documents):
            if document.place in left_out.tolist() or (document.content < threshold) != (split == "val"):
                continue
            if sum(shards[-1]) + len(document.ids) > 20:
                shards.append([])
            shards[-1].append(len(document.ids))
        assert [(shard.documents, shard.tokens) for shard in plan.shards] == [(len(s), sum(s)) for s in shards]
        assert plan.lengths.tolist() == np.bincount(np.concatenate(shards)).tolist()


def test_of_runs_with_a_common_piece_one_is_taken(tmp_path: Path) -> None:
    """As a killed builder, whose worker still wrote, and the next builder may leave them."""
    documents = some_documents(6, 100)
    for name, pieces in (("a", [(0, 1), (0, 2)]), ("b", [(0, 2), (0, 3)]), ("c", [(1, 2)])):
        write_run(tmp_path, name, documents, RunSummary(pieces, 6, 6, 0, 0, []))
    (tmp_path / "d.data").write_bytes(b"unfinished: there is no d.json")
    assert [path.stem for path in find_runs(tmp_path)] == ["a", "c"]


def test_places_hold_file_and_line() -> None:
    assert file_and_line(place(70_000, 123_456_789_012)) == (70_000, 123_456_789_012)
    assert place(1, 1) > place(0, (1 << 40) - 1)


def test_tokens_are_found_at_their_offset(tmp_path: Path) -> None:
    documents = some_documents(20, 100)
    (run,) = in_runs(tmp_path / "runs", documents, 1)
    assert sum(run.documents[TOKENS].tolist()) == sum(len(document.ids) for document in documents)
    assert run.data.stat().st_size == sum(len(document.id) + 2 * len(document.ids) for document in documents)


class Squares:
    """A worker that counts its tasks; some numbers make it fail."""

    def __init__(self, bad: dict[int, str]) -> None:
        self._bad = bad
        self._done = 0

    def __call__(self, task: int) -> int:
        if self._bad.get(task) == "raise":
            raise ZeroDivisionError("in the task")
        if self._bad.get(task) == "refuse":
            raise BadInput("the file is wrong")
        if self._bad.get(task) == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        self._done += 1
        return task**2

    def finish(self) -> str:
        return f"{self._done} done"


@pytest.mark.parametrize("workers", [1, 2])
def test_pool_gives_every_result_once(workers: int) -> None:
    results = list(run_pool(workers, Squares, ({},), iter(range(20))))
    assert sorted(result for result in results if isinstance(result, int)) == [n**2 for n in range(20)]
    finished = [result for result in results if isinstance(result, str)]
    assert len(finished) == workers
    assert sum(int(result.split()[0]) for result in finished) == 20


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ("raise", RuntimeError, "in a worker:(.|\n)*ZeroDivisionError: in the task"),
        ("refuse", BadInput, "the file is wrong"),
        ("die", RuntimeError, "ended with code -9"),
    ],
)
def test_pool_ends_when_a_worker_fails(how: str, error: type[Exception], message: str) -> None:
    make: Callable[..., Squares] = Squares
    with pytest.raises(error, match=message):
        list(run_pool(2, make, ({7: how},), iter(range(1000))))
