"""bestfit and pad: every token an input once, targets inside documents only, best fit as the textbook has it."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_gpt.cli import BadInput
from lit_gpt.config import IGNORE_INDEX
from lit_gpt.data.loader import PackedDataset
from lit_gpt.data.packing import Window, best_fit, pack
from lit_gpt.data.row_reader import open_sources
from lit_gpt.data.token_store import TokenStore, document_ends, write_store
from tests.support.small_store import EOS, make_store, shard_tokens


def textbook_best_fit(lengths: list[int], capacity: int) -> list[int]:
    """Room left in each bin, in order of opening."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms[rooms.index(min(fitting))] -= length
        else:
            rooms.append(capacity - length)
    return rooms


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=80))
def test_best_fit_is_the_textbook_s(lengths: list[int]) -> None:
    bins = best_fit(np.array(lengths), 20)
    rooms = 20 - np.bincount(bins, weights=lengths)
    assert sorted(rooms.tolist()) == sorted(textbook_best_fit(lengths, 20))


def segments_of(store: TokenStore, packing: str, block_size: int) -> list[tuple[list[int], list[int]]]:
    """(tokens, targets) of every segment of an epoch, as a model would see them, padding left out."""
    dataset = PackedDataset(store, block_size, seed=3, packing=packing)
    found = []
    for slot in range(dataset.rows_per_epoch):
        batch, _ = dataset.read(np.array([slot]))
        edges = sorted(set(batch.cu_seqlens.tolist()))
        tokens, targets = batch.tokens[0].tolist(), batch.targets[0].tolist()
        for start, stop in itertools.pairwise(edges):
            padding = stop - start > 1 and set(tokens[start:stop]) == {EOS}
            if not padding:
                found.append((tokens[start:stop], targets[start:stop]))
    return found


@pytest.mark.parametrize("block_size", [16, 64, 1000])
@pytest.mark.parametrize("packing", ["bestfit", "pad"])
def test_segments_are_the_documents_cut_only_where_they_are_longer_than_a_row(
    tmp_path: Path, packing: str, block_size: int
) -> None:
    store = make_store(tmp_path / "store", 60)
    expected = []
    for number, shard in enumerate(store.shards):
        tokens, begin = shard_tokens(store, number), 0
        for end in document_ends(store, shard).tolist():
            targets = [*tokens[begin + 1 : end], IGNORE_INDEX]
            for start in range(0, end - begin, block_size):
                piece = slice(begin + start, min(begin + start + block_size, end))
                expected.append((tokens[piece], targets[start : start + block_size]))
            begin = end
    found = segments_of(store, packing, block_size)
    one_token = ([EOS], [IGNORE_INDEX])  # an empty document and one token of padding look the same
    assert sorted(piece for piece in found if piece != one_token) == sorted(
        piece for piece in expected if piece != one_token
    )


def test_best_fit_leaves_almost_no_padding_on_documents_of_natural_length() -> None:
    lengths = np.clip(np.exp(np.random.default_rng(0).normal(5.9, 1.14, 20_000)).astype(int), 2, 100_000)
    packed = pack(np.cumsum(lengths), 2048, "bestfit")
    assert 1 - lengths.sum() / (packed.rows * 2048) < 0.0005
    padded = pack(np.cumsum(lengths), 2048, "pad")
    assert 1 - lengths.sum() / (padded.rows * 2048) > 0.6


@pytest.mark.parametrize("packing", ["window", "bestfit", "pad"])
def test_the_rows_of_a_document_are_those_whose_spans_meet_it(packing: str) -> None:
    random = np.random.default_rng(1)
    ends = np.cumsum(random.integers(1, 90, 50))
    rows = Window(int(ends[-1]), 16) if packing == "window" else pack(ends, 16, packing)
    spans = rows.spans(np.arange(rows.rows))
    for begin, end in zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True):
        expected = sorted(
            (int(row), max(start, begin), min(start + inputs, end))
            for row, start, inputs in zip(spans.row, spans.start.tolist(), spans.inputs.tolist(), strict=True)
            if start < end and start + inputs > begin
        )
        met = rows.rows_between(begin, end)
        assert sorted(zip(met.row.tolist(), met.start.tolist(), met.stop.tolist(), strict=True)) == expected


OPEN = """
import sys
from pathlib import Path
from lit_gpt.data.row_reader import RowReader
from lit_gpt.data.token_store import TokenStore
print(RowReader([TokenStore.open(sys.argv[1])], 16, 3, packing="bestfit").rows_per_epoch)
"""


def test_processes_that_open_at_once_share_one_index(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", 60)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    processes = [
        subprocess.Popen([sys.executable, "-c", OPEN, str(store.path)], stdout=subprocess.PIPE, env=environment)
        for _ in range(2)
    ]
    rows = [process.communicate()[0] for process in processes]
    assert rows[0] == rows[1] != b""
    (index,) = (store.path / "packing").iterdir()
    names = {path.name for path in index.iterdir()}
    assert names == {"lock", "rows.npy", *(f"{shard.name}.npz" for shard in store.shards)}


def test_an_index_that_cannot_be_written_says_what_to_do(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", 10)
    (store.path / "packing").write_text("in the way")
    with pytest.raises(BadInput, match="give a --cache_dir"):
        PackedDataset(store, 16, seed=3, packing="bestfit")
    dataset = PackedDataset(store, 16, seed=3, packing="bestfit", index_dir=tmp_path / "index")
    assert dataset.rows_per_epoch > 0


def test_sources_are_mixed_by_weight_each_in_its_own_order(tmp_path: Path) -> None:
    stores = [make_store(tmp_path / "a", 200, seed=1), make_store(tmp_path / "b", 300, seed=2)]
    dataset = PackedDataset(stores, 16, seed=3, weights=[3, 1], max_epochs=2)
    places = dataset.locate(np.arange(dataset.total_rows))
    alone = [PackedDataset(store, 16, seed=3) for store in stores]
    assert np.bincount(places.source).tolist() == dataset.mixture.consumed(dataset.total_rows)
    assert np.bincount(places.source)[0] == 2 * alone[0].rows_per_epoch
    first = places.source == 0
    seen = list(
        zip(places.epoch[first].tolist(), places.shard[first].tolist(), places.row[first].tolist(), strict=True)
    )
    assert len(set(seen)) == len(seen)
    assert abs((~first).sum() / first.sum() - 1 / 3) < 0.03
    assert dataset.epochs(dataset.total_rows)[0] == 2.0
    natural = PackedDataset(stores, 16, seed=3).mixture.counts
    assert abs(natural[0] / 4096 - alone[0].rows_per_epoch / sum(one.rows_per_epoch for one in alone)) < 0.001


def test_sources_are_named_by_folder_and_weight(tmp_path: Path) -> None:
    names = [str(make_store(tmp_path / name, 20).path) for name in ("a", "b:2")]
    stores, weights = open_sources(names)
    assert ([store.path.name for store in stores], weights) == (["a", "b:2"], None)
    stores, weights = open_sources([f"{names[0]}:3", f"{names[1]}:0.5"])
    assert ([store.path.name for store in stores], weights) == (["a", "b:2"], [3.0, 0.5])
    with pytest.raises(BadInput, match="a weight to each"):
        open_sources([names[0], f"{names[1]}:1"])
    with pytest.raises(BadInput, match="'x' is no weight"):
        open_sources([f"{names[0]}:x"])


def test_sources_of_two_tokenizers_are_not_mixed(tmp_path: Path) -> None:
    other = write_store(
        tmp_path / "b", [("x", [3, 4, EOS])], tokenizer_fingerprint="b", vocab_size=1000, bos_id=None, eos_id=EOS
    )
    with pytest.raises(BadInput, match="different tokenizers"):
        PackedDataset([make_store(tmp_path / "a", 20), other], 16, seed=3)
