"""Rows, batches and steps, compared with a brute-force walk over the documents; ranks, resume, faults."""

from __future__ import annotations

import ctypes
import os
import re
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import xxhash

from lit_gpt.cli import BadInput
from lit_gpt.config import IGNORE_INDEX
from lit_gpt.data import row_reader
from lit_gpt.data.loader import CU_SEQLENS_MULTIPLE, Batch, PackedDataset, StepLoader, validation_batches
from lit_gpt.data.token_store import HEADER_BYTES, DamagedShard, TokenStore, document_ends, write_store
from tests.support.small_store import EOS, VOCABULARY, make_store, shard_tokens


@pytest.fixture
def store(tmp_path: Path) -> TokenStore:
    return make_store(tmp_path / "store", 60)


class Row:
    """What a window row must hold, by walking token for token."""

    def __init__(self, store: TokenStore, shard: int, row: int, block_size: int) -> None:
        tokens, ends = shard_tokens(store, shard), set(document_ends(store, store.shards[shard]).tolist())
        self.stored = tokens[row * block_size : (row + 1) * block_size + 1]
        self.tokens, self.targets, self.starts = [], [], [0]
        for place in range(row * block_size, row * block_size + len(self.stored) - 1):
            self.tokens.append(tokens[place])
            document_ended = place + 1 in ends
            self.targets.append(IGNORE_INDEX if document_ended else tokens[place + 1])
            if document_ended:
                self.starts.append(len(self.tokens))
        if len(self.tokens) < block_size:
            self.starts.append(len(self.tokens))
        self.targets += [IGNORE_INDEX] * (block_size - len(self.tokens))
        self.tokens += [EOS] * (block_size - len(self.tokens))
        self.starts = sorted({start for start in self.starts if start < block_size})


def brute_rows(store: TokenStore, block_size: int) -> dict[tuple[int, int], Row]:
    return {
        (shard, row): Row(store, shard, row, block_size)
        for shard, entry in enumerate(store.shards)
        for row in range((entry.tokens - 1 + block_size - 1) // block_size)
    }


def check_batch(batch: Batch, rows: Sequence[Row], block_size: int) -> None:
    assert batch.tokens.tolist() == [row.tokens for row in rows]
    assert batch.targets.tolist() == [row.targets for row in rows]
    size = len(rows) * block_size
    starts = [number * block_size + start for number, row in enumerate(rows) for start in row.starts]
    entries = batch.cu_seqlens.tolist()
    assert entries[: len(starts)] == starts
    assert set(entries[len(starts) :]) == {size}
    assert len(entries) % CU_SEQLENS_MULTIPLE == 0
    assert len(entries) - len(starts) <= CU_SEQLENS_MULTIPLE


def test_the_layout_that_row_reader_draws(tmp_path: Path) -> None:
    """Token n of the shard has id n + 1; 0 pads."""
    documents = [("a", range(1, 6)), ("b", range(6, 9)), ("c", range(9, 16))]
    store = write_store(tmp_path / "abc", documents, tokenizer_fingerprint="", vocab_size=16, bos_id=None, eos_id=0)
    names = ["a0", "a1", "a2", "a3", "a4", "b0", "b1", "b2", *(f"c{n}" for n in range(7))]

    def drawn(line: str) -> list[int]:
        (found,) = re.findall(rf"^ +{line} +(\S.*)", str(row_reader.__doc__), re.MULTILINE)
        meaning = {".": 0, "-": IGNORE_INDEX} | {name: number for number, name in enumerate(names, start=1)}
        return [meaning[name] if name in meaning else int(name) for name in found.split()]

    assert document_ends(store, store.shards[0]).tolist() == drawn("document_ends")
    dataset = PackedDataset(store, 6, seed=3)
    batch, _ = dataset.read(dataset.orders[0].slot_of(0, 0, [0, 1, 2]))
    assert batch.tokens.flatten().tolist() == drawn("inputs")
    assert batch.targets.flatten().tolist() == drawn("targets")
    assert batch.cu_seqlens.unique().tolist() == drawn("cu_seqlens")


@pytest.mark.parametrize("block_size", [1, 7, 64, 1000])
def test_every_row_of_an_epoch_equals_a_walk_over_the_documents(store: TokenStore, block_size: int) -> None:
    dataset = PackedDataset(store, block_size, seed=3)
    brute = brute_rows(store, block_size)
    assert dataset.rows_per_epoch == len(brute)
    slots = np.arange(dataset.rows_per_epoch)
    places = dataset.locate(slots)
    keys = list(zip(places.shard.tolist(), places.row.tolist(), strict=True))
    assert sorted(keys) == sorted(brute)
    batch, digest = dataset.read(slots)
    check_batch(batch, [brute[key] for key in keys], block_size)
    hashes = [
        xxhash.xxh3_64_intdigest(np.array(brute[key].stored, "<u2").tobytes(), seed=slot)
        for slot, key in enumerate(keys)
    ]
    assert digest == sum(hashes) % 2**64


def steps_of(store: TokenStore, world_size: int, micro: int, first: int, count: int | None) -> list[list]:
    """Per step: first slot, the rows' slots and tokens over all ranks in order of slot, targets, digest."""
    sizes = dict(global_batch_size=8, micro_batch_size=micro, world_size=world_size)
    loaders = [
        StepLoader(dataset, rank=rank, first_slot=first, max_steps=count, **sizes)
        for rank, dataset in enumerate(PackedDataset(store, 16, seed=5, max_epochs=2) for _ in range(world_size))
    ]
    found = []
    for steps in zip(*loaders, strict=True):
        rows = sorted(
            (slot, tuple(row))
            for step in steps
            for batch in step.batches
            for slot, row in zip(batch.slots.tolist(), batch.tokens.tolist(), strict=True)
        )
        found.append([steps[0].first_slot, rows, sum(s.targets for s in steps), sum(s.digest for s in steps) % 2**64])
    for loader in loaders:
        loader.close()
    return found


def test_steps_are_the_same_for_every_world_micro_batch_and_resume(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", 40)
    dataset = PackedDataset(store, 16, seed=5, max_epochs=2)
    whole = steps_of(store, 1, 8, 0, None)
    assert len(whole) == 2 * dataset.rows_per_epoch // 8
    assert [slot for slot, _ in whole[3][1]] == list(range(24, 32))
    for world_size, micro in [(1, 1), (2, 1), (2, 4), (4, 2), (8, 1)]:
        assert steps_of(store, world_size, micro, 0, None) == whole
    # 4 -> 2 -> 1 -> 4 ranks, the last from the second epoch
    parts = [(4, 2, 0, 3), (2, 2, 24, 5), (1, 4, 64, len(whole) - 10), (4, 1, (len(whole) - 2) * 8, None)]
    assert [step for part in parts for step in steps_of(store, *part)] == whole


def test_the_data_ends_at_the_same_step_and_says_so_again(store: TokenStore) -> None:
    dataset = PackedDataset(store, 16, seed=5)
    with StepLoader(dataset, global_batch_size=8, micro_batch_size=2, rank=1, world_size=2) as loader:
        assert len(list(loader)) == dataset.rows_per_epoch // 8
        assert list(loader) == []
        assert loader.take_wait_s() > 0
        assert loader.take_wait_s() == 0


def test_cross_document_attention_makes_a_row_one_segment(store: TokenStore) -> None:
    dataset = PackedDataset(store, 64, seed=3, cross_document_attention=True)
    batch, _ = dataset.read(np.arange(dataset.rows_per_epoch))
    padded = [row.index(IGNORE_INDEX) for row in batch.targets.tolist() if IGNORE_INDEX in row]
    assert len(padded) == sum((shard.tokens - 1) % 64 != 0 for shard in store.shards)
    segments = len(set(batch.cu_seqlens.tolist())) - 1
    assert segments == dataset.rows_per_epoch + len(padded)


def test_validation_shows_each_row_once_and_gives_all_ranks_equally_many_batches(store: TokenStore) -> None:
    dataset = PackedDataset(store, 16, seed=5)
    seen, counts = [], set()
    for rank in range(3):
        batches = list(validation_batches(dataset, micro_batch_size=4, rank=rank, world_size=3))
        counts.add(len(batches))
        for batch in batches:
            for slot, targets in zip(batch.slots.tolist(), batch.targets.tolist(), strict=True):
                seen += [slot] if slot >= 0 else []
                assert (set(targets) == {IGNORE_INDEX}) or slot >= 0
    assert sorted(seen) == list(range(dataset.rows_per_epoch))
    assert len(counts) == 1
    few = list(validation_batches(dataset, micro_batch_size=4, rank=0, world_size=1, max_rows=5))
    assert [batch.slots.tolist() for batch in few] == [[0, 1, 2, 3], [4, -1, -1, -1]]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((10, 4, 2), "Valid: micro_batch_size 1, 5 or global_batch_size 8 or 16"),
        ((9, 1, 2), "Valid: global_batch_size 8 or 10"),
        ((3, 4, 2), "Valid: global_batch_size 8"),
        ((8, 0, 2), "micro_batch_size=0 rows: must be at least 1"),
    ],
)
def test_batches_that_do_not_divide_name_the_valid_ones(
    store: TokenStore, sizes: tuple[int, int, int], message: str
) -> None:
    dataset = PackedDataset(store, 16, seed=5)
    with pytest.raises(BadInput, match=message):
        StepLoader(dataset, global_batch_size=sizes[0], micro_batch_size=sizes[1], rank=0, world_size=sizes[2])


def test_bad_settings_are_refused(store: TokenStore, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="valid are window, bestfit, pad"):
        PackedDataset(store, 16, seed=5, packing="best")
    with pytest.raises(BadInput, match="block_size=0"):
        PackedDataset(store, 0, seed=5)
    with pytest.raises(BadInput, match="has no rows"):
        PackedDataset(make_store(tmp_path / "one", 1, longest=1), 16, seed=5)
    dataset = PackedDataset(store, 16, seed=5)
    with pytest.raises(BadInput, match="too few for one step"):
        StepLoader(dataset, global_batch_size=4096, micro_batch_size=1, rank=0, world_size=1)


def test_a_foreign_token_id_is_refused_with_shard_and_offset(store: TokenStore) -> None:
    path = store.path / f"{store.shards[1].name}.tokens"
    with open(path, "r+b") as file:
        file.seek(HEADER_BYTES + 2 * 77)
        file.write((VOCABULARY + 5).to_bytes(2, "little"))
    dataset = PackedDataset(store, 16, seed=5)
    with pytest.raises(DamagedShard, match=r"00001.tokens: id 1005 at token 77, vocabulary of 1000"):
        dataset.read(np.arange(dataset.rows_per_epoch))


def test_the_thread_s_error_reaches_the_consumer_with_its_cause(store: TokenStore) -> None:
    os.truncate(store.path / f"{store.shards[2].name}.tokens", 400)
    dataset = PackedDataset(store, 16, seed=5)
    with (
        StepLoader(dataset, global_batch_size=2, micro_batch_size=2, rank=0, world_size=1) as loader,
        pytest.raises(RuntimeError, match=r"00002\.tokens") as raised,
    ):
        list(loader)
    assert isinstance(raised.value.__cause__, DamagedShard)


def test_a_thread_that_is_killed_does_not_hang_the_consumer(store: TokenStore) -> None:
    dataset = PackedDataset(store, 16, seed=5, max_epochs=1000)
    with StepLoader(dataset, global_batch_size=8, micro_batch_size=8, rank=0, world_size=1) as loader:
        next(loader)
        (thread,) = (thread for thread in threading.enumerate() if thread.name == "prefetch")
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit))
        with pytest.raises(RuntimeError, match="reading ahead failed"):
            list(loader)


def test_a_real_input_output_error_is_retried_with_the_shard_s_name(
    store: TokenStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("lit_gpt.data.open_shards.RETRY_DELAYS_S", (0.01, 0.01))
    dataset = PackedDataset(store, 16, seed=5)
    slots = np.arange(dataset.rows_per_epoch)
    expected = dataset.read(slots)[1]
    memory = os.open("/proc/self/mem", os.O_RDONLY)  # nothing is mapped at its start: the kernel answers EIO
    os.dup2(memory, dataset.shards.get(0, 1).file._descriptor)
    assert dataset.read(slots)[1] == expected
    assert [record.getMessage() for record in caplog.records] == [
        f"shard {store.path / '00001'}: Input/output error; try 1 failed after 0.0 s, next in 0.01 s"
    ]
    os.close(memory)


def test_an_input_output_error_that_stays_stops_the_run(store: TokenStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is skipped: after the last try the error names the shard."""
    monkeypatch.setattr("lit_gpt.data.open_shards.RETRY_DELAYS_S", ())
    dataset = PackedDataset(store, 16, seed=5)
    memory = os.open("/proc/self/mem", os.O_RDONLY)
    os.dup2(memory, dataset.shards.get(0, 1).file._descriptor)
    os.close(memory)
    with pytest.raises(OSError, match=r"Input/output error, 1 times in 0\.0 s: '.*00001'"):
        dataset.read(np.arange(dataset.rows_per_epoch))
