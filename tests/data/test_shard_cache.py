"""The node's shard cache: staging, sharing, the size limit, and failures that must not stop the run."""

from __future__ import annotations

import fcntl
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from lit_gpt.cli import BadInput
from lit_gpt.data.loader import PackedDataset, StepLoader
from lit_gpt.data.row_reader import RowReader
from lit_gpt.data.shard_cache import FOLDER, TAG, ShardCache, StagedFile, Wanted, refuse_foreign
from lit_gpt.data.token_store import HEADER_BYTES, DamagedShard, TokenStore
from tests.support.small_store import make_store

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def store(tmp_path: Path) -> TokenStore:
    return make_store(tmp_path / "store", 60)


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[ShardCache]:
    opened = ShardCache(tmp_path / "cache", 1 << 20)
    yield opened
    opened.close()


def is_held(lock: Path) -> bool:
    """Whether a cache holds the lock; the file may exist before that."""
    if not lock.exists():
        return False
    with lock.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def wait_for(condition: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.01)


def all_of(store: TokenStore) -> list[Wanted]:
    return [Wanted(store, shard) for shard in store.shards]


def staged(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder / FOLDER)) for path in (folder / FOLDER).glob("*/*.tokens"))


def digest(reader: RowReader) -> int:
    slots = np.arange(reader.rows_per_epoch)
    shape = (len(slots), reader.block_size)
    return reader.fill(slots, np.empty(shape, reader.dtype), np.empty(shape, np.int32)).digest


def test_reading_moves_to_the_copies_and_gives_the_same_rows(store: TokenStore, tmp_path: Path) -> None:
    expected = digest(RowReader([store], 16, 3))
    cache = ShardCache(tmp_path / "cache", 1 << 20)
    reader = RowReader([store], 16, 3, cache=cache)
    assert digest(reader) == expected
    wait_for(lambda: len(staged(tmp_path / "cache")) == len(store.shards))
    wait_for(lambda: cache.open(all_of(store)[-1]) is not None)
    before = cache.report()
    assert digest(reader) == expected
    after = cache.report()
    assert after.hits - before.hits == len(store.shards)
    assert after.misses == before.misses
    assert after.staged_bytes == sum(shard.bytes for shard in store.shards)
    assert isinstance(reader.shards.get(0, 0).file, StagedFile)
    for path in store.path.glob("*.tokens"):
        os.truncate(path, 0)  # the source is not needed any more
    assert digest(reader) == expected
    cache.close()


def test_the_bound_holds_and_what_is_not_wanted_goes_first(store: TokenStore, tmp_path: Path) -> None:
    folder, wanted = tmp_path / "cache", all_of(store)
    limit = sum(shard.bytes for shard in store.shards[:3])
    cache = ShardCache(folder, limit)
    cache.want(wanted[:3])
    wait_for(lambda: staged(folder) == [item.file for item in wanted[:3]])
    cache.want([wanted[2], wanted[3]])
    wait_for(lambda: wanted[3].file in staged(folder))
    assert wanted[2].file in staged(folder)
    assert sum(path.stat().st_size for path in (folder / FOLDER).glob("*/*")) <= limit
    cache.want(wanted)  # more than there is room for: the first ones
    wait_for(lambda: set(staged(folder)) >= {item.file for item in wanted[:2]})
    assert sum(path.stat().st_size for path in (folder / FOLDER).glob("*/*")) <= limit
    cache.close()


@pytest.mark.slow
def test_processes_of_a_node_share_one_stager(store: TokenStore, tmp_path: Path, cache: ShardCache) -> None:
    wait_for(lambda: is_held(tmp_path / "cache" / FOLDER / "lock"))
    second = ShardCache(tmp_path / "cache", 1 << 20)
    second.want(all_of(store))
    time.sleep(0.2)
    assert staged(tmp_path / "cache") == []
    cache.want(all_of(store))
    wait_for(lambda: second.open(all_of(store)[0]) is not None)
    assert second.report().staged_bytes == 0
    cache.close()
    for path in (tmp_path / "cache" / FOLDER).glob("*/*.tokens"):
        path.unlink()
    wait_for(lambda: second.report().staged_bytes > 0)  # it takes over
    second.close()


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_others_keep_there_stays(store: TokenStore, tmp_path: Path) -> None:
    """Data sets at any depth, partial files, names like ours, links: with room for two copies, all others must go."""
    folder = tmp_path / "cache"
    for name in (
        "data/train/00000.tokens", "00000.partial", "other/.x.host-1.partial", f"{store.dataset_id[:16]}/00000.tokens",
        "0123456789abcdef/00007.tokens", "packing/x/rows.npy", "lock",
    ):  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"of others")
    before = files_of(folder)
    wanted = all_of(store)
    cache = ShardCache(folder, 2 * max(shard.bytes for shard in store.shards))
    cache.want(wanted[:2])
    wait_for(lambda: len(staged(folder)) == 2)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "00000.tokens").write_bytes(b"of others")
    (folder / FOLDER / "fedcba9876543210").symlink_to(elsewhere)
    (folder / FOLDER / "notes").mkdir()
    (folder / FOLDER / "notes" / "00000.tokens").write_bytes(b"of others")
    cache.want(wanted[2:4])
    wait_for(lambda: {item.file for item in wanted[2:4]} <= set(staged(folder)))
    cache.close()
    after = files_of(folder)
    assert {name: after[name] for name in before} == before
    assert (elsewhere / "00000.tokens").read_bytes() == (folder / FOLDER / "notes" / "00000.tokens").read_bytes()


def test_a_folder_of_that_name_without_our_tag_is_left_alone(
    store: TokenStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache_dir = tmp_path / "cache"
    folder = cache_dir / FOLDER
    for tag in (None, "Signature: 8a477f597d28d172789f06886806bc55\n# of another program\n"):
        (folder / "0123456789abcdef").mkdir(parents=True, exist_ok=True)
        (folder / "0123456789abcdef" / "00000.tokens").write_bytes(bytes(100))
        if tag:
            (folder / TAG).write_text(tag)
        before = files_of(cache_dir)
        with pytest.raises(BadInput, match=f"--cache_dir .*{FOLDER} was not made by this program"):
            refuse_foreign(cache_dir)
        cache = ShardCache(cache_dir, 10)
        cache.want(all_of(store))
        wait_for(lambda: "left alone" in caplog.text)
        cache.close()
        caplog.clear()
        assert files_of(cache_dir) == before


def test_a_folder_with_a_store_in_it_is_refused(store: TokenStore, tmp_path: Path) -> None:
    for folder in (store.path, store.path.parent):
        with pytest.raises(BadInput, match=f"--cache_dir {folder}: {store.path} holds a data set"):
            refuse_foreign(folder)
    (tmp_path / "file").write_text("")
    for harmless in (tmp_path / "missing", tmp_path / "file", tmp_path / "missing" / "too"):
        refuse_foreign(harmless)
    cache = ShardCache(tmp_path / "cache", 1 << 20)
    cache.want(all_of(store))
    wait_for(lambda: len(staged(tmp_path / "cache")) == len(store.shards))
    cache.close()
    refuse_foreign(tmp_path / "cache")


STAGER = """
import sys, time
from pathlib import Path
import lit_gpt.data.shard_cache as cache
from lit_gpt.data.token_store import TokenStore
store = TokenStore.open(sys.argv[1])
cache._CHUNK_BYTES = 64
opened = cache.ShardCache(Path(sys.argv[2]), 1 << 20)
opened.want(cache.Wanted(store, shard) for shard in store.shards)
time.sleep(60)
"""


def test_a_stager_that_is_killed_leaves_nothing_that_hinders(store: TokenStore, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    for delay_s in (0.0, 0.002, 0.005, 0.01):
        process = subprocess.Popen(
            [sys.executable, "-c", STAGER, str(store.path), str(folder)], env={**os.environ, "PYTHONPATH": str(ROOT)}
        )
        wait_for(lambda: any((folder / FOLDER).glob("*/*")), seconds=20)
        time.sleep(delay_s)
        process.send_signal(signal.SIGKILL)
        process.wait()
        for name in staged(folder)[:-1]:
            (folder / FOLDER / name).unlink()
    (folder / FOLDER / store.dataset_id[:16] / "00000.partial").write_bytes(b"left over")
    cache = ShardCache(folder, 1 << 20)
    reader = RowReader([store], 16, 3, cache=cache)
    assert digest(reader) == digest(RowReader([store], 16, 3))
    wait_for(lambda: len(staged(folder)) == len(store.shards))
    wait_for(lambda: not list((folder / FOLDER).glob("*/*.partial")))
    cache.close()


def test_a_damaged_source_stops_the_run_naming_shard_and_block(store: TokenStore, tmp_path: Path) -> None:
    path = store.path / f"{store.shards[1].name}.tokens"
    raw = bytearray(path.read_bytes())
    raw[HEADER_BYTES + 10] ^= 4
    path.write_bytes(raw)
    cache = ShardCache(tmp_path / "cache", 1 << 20)
    dataset = PackedDataset(store, 16, 3, cache=cache, max_epochs=100_000)
    with (
        StepLoader(dataset, global_batch_size=8, micro_batch_size=8, rank=0, world_size=1) as loader,
        pytest.raises(RuntimeError, match=r"00001\.tokens: block 0 \(bytes 256 to \d+\) hashes to") as raised,
    ):
        list(loader)
    assert isinstance(raised.value.__cause__, DamagedShard)
    assert not (tmp_path / "cache" / FOLDER / store.dataset_id[:16] / "00001.tokens").exists()
    cache.close()


def test_a_spoilt_copy_is_read_from_the_source(
    store: TokenStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = ShardCache(tmp_path / "cache", 1 << 20)
    cache.want(all_of(store))
    wait_for(lambda: all(cache.open(item) for item in all_of(store)))
    os.truncate(tmp_path / "cache" / FOLDER / all_of(store)[1].file, 300)
    reader = RowReader([store], 16, 3, cache=cache)
    assert digest(reader) == digest(RowReader([store], 16, 3))
    assert "300 bytes where" in caplog.text
    cache.close()


FULL = """
import resource, signal, sys, time
from pathlib import Path
import numpy as np
from lit_gpt.data.row_reader import RowReader
from lit_gpt.data.shard_cache import ShardCache
from lit_gpt.data.token_store import TokenStore
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))  # the kernel refuses the 501st byte of any file
import logging; logging.basicConfig(level=logging.INFO)
cache = ShardCache(Path(sys.argv[2]), 1 << 20)
reader = RowReader([TokenStore.open(sys.argv[1])], 16, 3, cache=cache)
slots = np.arange(reader.rows_per_epoch)
shape = (len(slots), 16)
for _ in range(3):
    print(reader.fill(slots, np.empty(shape, reader.dtype), np.empty(shape, np.int32)).digest, cache.report().hits)
    time.sleep(0.3)
cache.close()
"""


@pytest.mark.slow
def test_a_disk_that_takes_no_more_costs_a_warning_only(store: TokenStore, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(store.path), str(tmp_path / "cache")],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0
    assert done.stdout == f"{digest(RowReader([store], 16, 3))} 0\n" * 3
    assert done.stderr.count("shards are read from their source") == 1
    assert not list((tmp_path / "cache" / FOLDER).glob("*/*"))


def test_a_full_disk_costs_a_warning_only(store: TokenStore, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A real file system of 4 KiB: the kernel answers ENOSPC."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here: this test needs root")
    try:
        (disk / "others").write_bytes(bytes(4096))
        cache = ShardCache(disk, 1 << 20)
        reader = RowReader([store], 16, 3, cache=cache)
        for _ in range(3):
            assert digest(reader) == digest(RowReader([store], 16, 3))
            time.sleep(0.3)
        assert cache.report().hits == 0
        cache.close()
        assert "No space left on device" in caplog.text
        assert (disk / "others").stat().st_size == 4096  # what others keep there is not touched
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_folder_that_cannot_be_made_costs_a_warning_only(
    store: TokenStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    caplog.set_level(logging.WARNING)
    cache = ShardCache(tmp_path / "file" / "cache", 1 << 20)
    reader = RowReader([store], 16, 3, cache=cache)
    assert digest(reader) == digest(RowReader([store], 16, 3))
    wait_for(lambda: "shards are read from their source" in caplog.text)
    cache.close()
