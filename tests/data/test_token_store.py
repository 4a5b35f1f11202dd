"""The token store: what was written is read back, and every kind of damage is found and located."""

from __future__ import annotations

import hashlib
import json
import struct
import time
from pathlib import Path

import numpy as np
import pytest

from lit_gpt.cli import BadInput
from lit_gpt.data.token_store import (
    BLOCK_BYTES,
    HEADER_BYTES,
    DamagedShard,
    ShardFile,
    ShardWriter,
    TokenStore,
    Vocabulary,
    document_ends,
    documents,
    write_store,
)

IDS = [[5, 6, 2], [7, 2], [8, 9, 10, 2], [2], [11, 12, 13, 14, 2]]


def small_store(path: Path, vocab_size: int = 100, shard_tokens: int = 6) -> TokenStore:
    """Five documents of 3, 2, 4, 1 and 5 tokens; at most 6 tokens per shard gives shards of 5, 5 and 5."""
    return write_store(
        path,
        [(f"doc{number}", ids) for number, ids in enumerate(IDS)],
        tokenizer_fingerprint="ab" * 32,
        vocab_size=vocab_size,
        bos_id=None,
        eos_id=2,
        shard_tokens=shard_tokens,
    )


def big_store(path: Path) -> TokenStore:
    """One shard of 1.2 M tokens: 2.4 MB, so blocks 0, 1 and a short block 2."""
    ids = (np.arange(1_200_000) % 97).tolist()
    return write_store(path, [("big", ids)], tokenizer_fingerprint="f", vocab_size=97, bos_id=1, eos_id=2)


def flip(path: Path, byte: int) -> None:
    data = bytearray(path.read_bytes())
    data[byte] ^= 0x10
    path.write_bytes(data)


def test_reads_what_was_written(tmp_path: Path) -> None:
    store = TokenStore.open(small_store(tmp_path).path)
    assert [shard.tokens for shard in store.shards] == [5, 5, 5]
    assert (store.tokens, store.documents, store.text_bytes) == (15, 5, 15)
    assert (store.vocab_size, store.bos_id, store.eos_id, store.tokenizer_fingerprint) == (100, None, 2, "ab" * 32)
    read = []
    for shard in store.shards:
        with ShardFile(tmp_path, shard, store) as file:
            file.verify()
            read += file.read(0, shard.tokens).tolist()
            assert file.read(1, 3).tolist() == file.read(0, shard.tokens).tolist()[1:3]
    assert read == [id for ids in IDS for id in ids]
    assert [document_ends(store, shard).tolist() for shard in store.shards] == [[3, 5], [4, 5], [5]]
    assert documents(store, store.shards[1])["id"].to_pylist() == ["doc2", "doc3"]


def test_file_layout_is_frozen(tmp_path: Path) -> None:
    """Offsets as docs/data.md and other readers know them: ids at byte 256, little-endian uint16."""
    small_store(tmp_path)
    raw = (tmp_path / "00000.tokens").read_bytes()
    assert HEADER_BYTES == 256
    assert raw[:8] == b"LLMtoks\n"
    assert struct.unpack("<IIQQIii", raw[8:44]) == (1, 2, 5, 2, 100, -1, 2)
    assert np.frombuffer(raw, "<u2", 5, 256).tolist() == [5, 6, 2, 7, 2]
    assert len(raw) == 256 + 10 + 8 + 24  # one block hash; the seal is two hashes and the end mark
    assert raw.endswith(b"\nLLMend\n")


def test_dataset_id_is_hash_of_manifest(tmp_path: Path) -> None:
    store = small_store(tmp_path)
    assert store.dataset_id == hashlib.sha256((tmp_path / "MANIFEST.json").read_bytes()).hexdigest()


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65_535, "<u2"), (65_536, "<u4"), (128_256, "<u4")])
def test_wide_vocabulary_takes_four_bytes(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    ids = [0, vocab_size - 1]
    store = write_store(tmp_path, [("a", ids)], tokenizer_fingerprint="f", vocab_size=vocab_size, bos_id=1, eos_id=2)
    assert store.dtype == np.dtype(dtype)
    with ShardFile(tmp_path, store.shards[0], store) as file:
        assert file.read(0, 2).tolist() == ids


def test_opening_needs_the_manifest_only_and_is_fast(tmp_path: Path) -> None:
    """15,000 shards are 1 T tokens; no other file of this store exists."""
    store = small_store(tmp_path / "small")
    manifest = json.loads((tmp_path / "small/MANIFEST.json").read_text())
    manifest["shards"] = [{**manifest["shards"][0], "name": f"{number:05d}"} for number in range(15_000)]
    manifest["tokens"] = 15_000 * store.shards[0].tokens
    folder = tmp_path / "large"
    folder.mkdir()
    (folder / "MANIFEST.json").write_text(json.dumps(manifest))
    begin = time.perf_counter()
    assert len(TokenStore.open(folder).shards) == 15_000
    assert time.perf_counter() - begin < 1


def test_files_outside_the_manifest_are_ignored(tmp_path: Path) -> None:
    store = small_store(tmp_path)
    (tmp_path / "00099.tokens").write_bytes(b"left over")
    assert TokenStore.open(tmp_path).dataset_id == store.dataset_id


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: None, "no such folder"),
        (lambda folder: folder.touch(), "that is a file; give a folder that scripts/prepare_data.py wrote"),
        (lambda folder: folder.mkdir(), "MANIFEST.json is missing"),
        (lambda folder: small_store(folder / "train"), "did you mean .*train"),
        (lambda folder: (small_store(folder), (folder / "MANIFEST.json").write_text("{")), "damaged"),
        (lambda folder: (small_store(folder), (folder / "MANIFEST.json").write_text("[]")), "damaged"),
        (lambda folder: (small_store(folder), (folder / "MANIFEST.json").write_text("{}")), "damaged"),
        (lambda folder: edit_manifest(folder, format_version=7), "is of format 7, this program reads 1"),
        (lambda folder: edit_manifest(folder, tokens=16), "do not add up"),
    ],
)
def test_bad_folders_are_refused_in_one_line(tmp_path: Path, damage, message: str) -> None:
    damage(tmp_path / "data")
    with pytest.raises(BadInput, match=message) as raised:
        TokenStore.open(tmp_path / "data")
    assert str(tmp_path / "data") in str(raised.value)
    assert "\n" not in str(raised.value)


def edit_manifest(folder: Path, **values: int) -> None:
    small_store(folder)
    manifest = json.loads((folder / "MANIFEST.json").read_text())
    (folder / "MANIFEST.json").write_text(json.dumps({**manifest, **values}))


@pytest.mark.parametrize("missing_bytes", [1, 24, 100, 2_000_000])
def test_cut_shard_is_refused_at_open(tmp_path: Path, missing_bytes: int) -> None:
    store = big_store(tmp_path)
    path = tmp_path / "00000.tokens"
    path.write_bytes(path.read_bytes()[:-missing_bytes])
    with pytest.raises(DamagedShard, match=r"00000\.tokens: \d+ bytes where 2400304 belong"):
        ShardFile(tmp_path, store.shards[0], store)


def test_missing_and_foreign_shards_are_refused_at_open(tmp_path: Path) -> None:
    store = small_store(tmp_path / "a")
    other = small_store(tmp_path / "b", vocab_size=101)
    path = tmp_path / "a" / "00001.tokens"
    path.write_bytes((other.path / "00001.tokens").read_bytes())
    with pytest.raises(DamagedShard, match=r"00001\.tokens: its header is not that of shard 00001"):
        ShardFile(store.path, store.shards[1], store)
    path.unlink()
    with pytest.raises(DamagedShard, match=r"00001\.tokens: missing"):
        ShardFile(store.path, store.shards[1], store)


def test_lost_end_mark_is_refused_at_open(tmp_path: Path) -> None:
    """A file whose size is right and whose tail was never written, as after a crash of a file system."""
    store = small_store(tmp_path)
    path = tmp_path / "00002.tokens"
    path.write_bytes(path.read_bytes()[:-8] + bytes(8))
    with pytest.raises(DamagedShard, match="end mark is missing"):
        ShardFile(tmp_path, store.shards[2], store)


@pytest.mark.parametrize(
    ("byte", "located"),
    [
        (HEADER_BYTES, "block 0"),
        (HEADER_BYTES + BLOCK_BYTES - 1, "block 0"),
        (HEADER_BYTES + BLOCK_BYTES, "block 1"),
        (HEADER_BYTES + 2_399_999, "block 2"),
        (HEADER_BYTES + 2_400_000, "block hashes in the footer"),
        (HEADER_BYTES + 2_400_024, "the header does not hash"),
    ],
)
def test_flipped_bit_is_located(tmp_path: Path, byte: int, located: str) -> None:
    store = big_store(tmp_path)
    flip(tmp_path / "00000.tokens", byte)
    with ShardFile(tmp_path, store.shards[0], store) as file, pytest.raises(DamagedShard, match=located) as raised:
        file.verify()
    assert "00000.tokens" in str(raised.value)


def test_swapped_shards_are_found(tmp_path: Path) -> None:
    """Two whole files of equal size and header under each other's name: only the manifest's hash tells."""
    store = small_store(tmp_path)
    first, last = tmp_path / "00000.tokens", tmp_path / "00001.tokens"
    first_bytes, last_bytes = first.read_bytes(), last.read_bytes()
    first.write_bytes(last_bytes)
    last.write_bytes(first_bytes)
    with ShardFile(tmp_path, store.shards[0], store) as file, pytest.raises(DamagedShard, match="not the file of"):
        file.verify()


def test_file_that_shrinks_while_open_is_an_error(tmp_path: Path) -> None:
    store = big_store(tmp_path)
    with ShardFile(tmp_path, store.shards[0], store) as file:
        with open(tmp_path / "00000.tokens", "r+b") as other:
            other.truncate(1000)
        assert len(file.read(0, 300)) == 300
        with pytest.raises(DamagedShard, match="truncated while open"):
            file.read(0, 400)


def test_damaged_document_table_is_found(tmp_path: Path) -> None:
    store = small_store(tmp_path)
    flip(tmp_path / "00000.docs.parquet", 60)
    with pytest.raises(DamagedShard, match=r"00000\.docs\.parquet"):
        document_ends(store, store.shards[0])
    (tmp_path / "00001.docs.parquet").unlink()
    with pytest.raises(DamagedShard, match=r"00001\.docs\.parquet: missing"):
        documents(store, store.shards[1])


@pytest.mark.parametrize("ids", [[], [100], [-1, 5]])
def test_writer_refuses_ids_outside_the_vocabulary(tmp_path: Path, ids: list[int]) -> None:
    writer = ShardWriter(tmp_path, "00000", Vocabulary("f", 100, None, 2))
    with pytest.raises(ValueError, match="document doc"):
        writer.add(ids, "doc")
