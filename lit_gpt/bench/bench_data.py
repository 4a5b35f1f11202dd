"""Measurements of the data path against what it is compared with; what scripts/benchmark_data.py prints.

Each line and its reference come from one run on one machine. Timings are the best of several repetitions.
"""

from __future__ import annotations

import gzip
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from torch.utils.data import DataLoader

from lit_gpt.bench.peer_loaders import Blocks, DocumentRows, consume
from lit_gpt.bench.timing import host_seconds
from lit_gpt.cli import BadInput
from lit_gpt.data.loader import PackedDataset, StepLoader
from lit_gpt.data.row_reader import RowReader
from lit_gpt.data.token_store import (
    HEADER_BYTES,
    SHARD_TOKENS,
    Shard,
    TokenStore,
    document_ends,
    write_manifest,
    write_store,
)
from lit_gpt.datapoints.log import DatapointLog
from lit_gpt.datapoints.query import Replay

BLOCK = 2048
STEP_ROWS = 256
STEP_S = 0.25
"""Seconds of a pretended step of STEP_ROWS rows; the smallest model on an H100 takes several times as long."""
VOCABULARY = 32_010
MEDIAN_TOKENS, SIGMA = 368, 1.14
PREPARE = Path(__file__).parents[2] / "scripts" / "prepare_data.py"
COPIES = 40
"""Repetitions of the source for tokenising: some seconds of work."""


def measure(
    tokens: int, source: Path | None, tokenizer_path: Path | None, work_dir: Path | None
) -> Iterator[dict[str, Any]]:
    """Every measurement, as it is made; those that need texts only where `source` and `tokenizer_path` are given."""
    torch.set_num_threads(1)
    texts = read_texts(source) if source else []
    with tempfile.TemporaryDirectory(dir=work_dir) as name:
        folder = Path(name)
        store = make_store(folder / "store", tokens)
        reader_tokens_per_s = yield from measure_reader(store)
        yield from measure_packing(store)
        yield from measure_scale(folder, store)
        yield from measure_loaders(store, reader_tokens_per_s, texts, tokenizer_path)
        if tokenizer_path:
            yield from measure_tokenising(folder, texts * COPIES, tokenizer_path)


def line(
    what: str, value: float, unit: str, reference: str = "", ratio: float | None = None, **more: Any
) -> dict[str, Any]:
    """One measurement, numbers rounded to four digits."""
    found = {"what": what, "value": float(f"{value:.4g}"), "unit": unit}
    if ratio is not None:
        found |= {"ratio": float(f"{ratio:.4g}"), "reference": reference}
    return found | more


def fastest(action: Callable[[], Any], times: int = 3) -> float:
    """Seconds of the fastest of some runs, the one that other processes disturbed least."""
    return min(host_seconds(action, times))


def random_documents(tokens: int, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(id, ids) of documents with natural lengths, `tokens` in all."""
    random, number = np.random.default_rng(0), 0
    while tokens > 0:
        length = min(tokens, max(2, int(random.lognormal(np.log(MEDIAN_TOKENS), SIGMA))))
        ids = random.integers(3, VOCABULARY, length, dtype=np.uint16)
        ids[-1] = 2
        yield f"{prefix}{number:08d}", ids
        tokens, number = tokens - length, number + 1


def make_store(path: Path, tokens: int) -> TokenStore:
    return write_store(
        path, random_documents(tokens), tokenizer_fingerprint="benchmark", vocab_size=VOCABULARY, bos_id=1, eos_id=2,
        shard_tokens=1 << 22,
    )  # fmt: skip


def measure_reader(store: TokenStore) -> Generator[dict[str, Any], None, float]:
    """Plain gather, then our reader; returns our tokens a second with digest."""
    dataset = PackedDataset(store, BLOCK, 3)
    rows = dataset.rows_per_epoch
    maps = [np.memmap(store.path / f"{shard.name}.tokens", "<u2", "r", HEADER_BYTES) for shard in store.shards]
    located = dataset.locate(np.arange(rows))
    wanted = list(zip(located.shard.tolist(), (located.row * BLOCK).tolist(), strict=True))

    def gather() -> None:
        for first in range(0, rows, 8):
            rows_of_batch = [maps[shard][start : start + BLOCK] for shard, start in wanted[first : first + 8]]
            np.stack([row if len(row) == BLOCK else np.resize(row, BLOCK) for row in rows_of_batch]).astype(np.int64)

    def read(digest: bool) -> None:
        tokens = np.empty((STEP_ROWS, BLOCK), np.uint16)
        targets = np.empty((STEP_ROWS, BLOCK), np.int32)
        for first in range(0, rows - STEP_ROWS + 1, STEP_ROWS):
            dataset.fill(first + np.arange(STEP_ROWS), tokens, targets, digest=digest)

    read_rows = rows // STEP_ROWS * STEP_ROWS
    plain = rows * BLOCK / fastest(gather)
    yield line("gather", plain / 1e6, "M tokens/s")
    pairs = [(fastest(lambda: read(False), 1), fastest(lambda: read(True), 1)) for _ in range(5)]
    bare, whole = (read_rows * BLOCK / min(seconds) for seconds in zip(*pairs, strict=True))
    yield line("reader without digest", bare / 1e6, "M tokens/s", "gather", bare / plain)
    yield line("reader", whole / 1e6, "M tokens/s", "gather", whole / plain)
    yield line("digest", 100 * (bare / whole - 1), "% of the reader's time")
    slots = np.arange(1 << 20) % dataset.total_rows
    yield line("order", 1e6 * fastest(lambda: dataset.locate(slots)) / len(slots), "us/row")
    return whole


def measure_packing(store: TokenStore) -> Iterator[dict[str, Any]]:
    by_shard = [document_ends(store, shard) for shard in store.shards]
    lengths = np.concatenate([np.diff(ends, prepend=0) for ends in by_shard])
    crossed = sum(int(((ends - 1) // BLOCK != (np.append(0, ends[:-1])) // BLOCK).sum()) for ends in by_shard)
    for packing in ("window", "bestfit", "pad"):
        begin = time.perf_counter()
        rows = RowReader([store], BLOCK, 3, packing=packing).rows_per_epoch
        cut = crossed if packing == "window" else int((lengths > BLOCK).sum())
        yield line(
            f"padding of {packing}", 100 * (1 - store.tokens / (rows * BLOCK)), "%",
            cut_documents_percent=round(100 * cut / len(lengths), 2), index_s=round(time.perf_counter() - begin, 2),
        )  # fmt: skip


def linked_store(path: Path, template: TokenStore, shards: int, *, own_ids: bool) -> TokenStore:
    """A store of many shards which are hard links to the template's first; own_ids: document names are not."""
    path.mkdir()
    first = template.shards[0]
    entries: list[Shard] = []
    for number in range(shards):
        name = f"{number:05d}"
        os.link(template.path / f"{first.name}.tokens", path / f"{name}.tokens")
        entry = first._replace(name=name)
        if own_ids:
            named = write_store(
                path / "named", random_documents(first.tokens, f"{number}-"), tokenizer_fingerprint="benchmark",
                vocab_size=VOCABULARY, bos_id=1, eos_id=2,
            )  # fmt: skip
            os.replace(path / "named" / "00000.docs.parquet", path / f"{name}.docs.parquet")
            entry = entry._replace(docs_bytes=named.shards[0].docs_bytes, docs_xxh3=named.shards[0].docs_xxh3)
        else:
            os.link(template.path / f"{first.name}.docs.parquet", path / f"{name}.docs.parquet")
        entries.append(entry)
    return write_manifest(path, entries, template.vocabulary, split="train", text_bytes=1)


def measure_scale(folder: Path, store: TokenStore) -> Iterator[dict[str, Any]]:
    """A resume at 15,000 shards, and questions to a store of a million rows."""
    large = linked_store(folder / "large", store, 15_000, own_ids=False)

    def resume() -> None:
        dataset = PackedDataset(TokenStore.open(large.path), BLOCK, 3, max_epochs=9)
        with StepLoader(
            dataset, global_batch_size=STEP_ROWS, micro_batch_size=8, rank=0, world_size=4,
            first_slot=dataset.total_rows // 7 * 5, max_steps=1,
        ) as loader:  # fmt: skip
            next(loader)

    yield line("first step after a resume at 15,000 shards", fastest(resume), "s")
    template = write_store(
        folder / "template", random_documents(SHARD_TOKENS), tokenizer_fingerprint="benchmark", vocab_size=VOCABULARY,
        bos_id=1, eos_id=2,
    )  # fmt: skip
    million = linked_store(folder / "million", template, 31, own_ids=True)
    dataset = PackedDataset(million, BLOCK, 3)
    rows, steps = 1024, dataset.total_rows // 1024
    details = {"world_size": 4, "micro_batch_size": 8, "train_data_dir": str(million.path)}
    slot_facts = {**dataset.slot_facts(), "global_batch_size": rows}
    with DatapointLog.open(folder / "run" / "datapoints", slot_facts, details=details) as log:
        for step in range(1, steps + 1):
            log.append(step, (step - 1) * rows, rows, rows * BLOCK - 3000, (1 << 64) - step)
        log_bytes = log.flush_and_fsync().bytes
    yield line("log", 100 * log_bytes / (steps * rows * BLOCK * 2), "% of the token bytes", rows=dataset.total_rows)
    questions: dict[str, Callable[[Replay], Any]] = {
        "step": lambda replay: replay.step(steps // 3),
        "doc": lambda replay: replay.document("17-00004711"),
    }
    for name, ask in questions.items():
        begin = time.perf_counter()
        ask(Replay(folder / "run"))
        first_s = time.perf_counter() - begin
        answer_s = fastest(lambda ask=ask: ask(Replay(folder / "run")))  # type: ignore[misc]
        yield line(f"query {name}", 1e3 * answer_s, "ms", first_ms=round(1e3 * first_s))


def measure_loaders(
    store: TokenStore, reader_tokens_per_s: float, texts: list[str], tokenizer_path: Path | None
) -> Iterator[dict[str, Any]]:
    def open_loader() -> StepLoader:
        dataset = PackedDataset(store, BLOCK, 3)
        return StepLoader(dataset, global_batch_size=STEP_ROWS, micro_batch_size=8, rank=0, world_size=1)

    def all_steps() -> None:
        with open_loader() as loader:
            for _ in loader:
                pass

    rows = PackedDataset(store, BLOCK, 3).total_rows // STEP_ROWS * STEP_ROWS
    ours = rows * BLOCK / fastest(all_steps)
    yield line("loader", ours / 1e6, "M tokens/s", "reader", ours / reader_tokens_per_s)
    with open_loader() as loader:
        next(loader)
        time.sleep(STEP_S)
        loader.take_wait_s()
        begin = time.perf_counter()
        for _ in zip(range(16), loader, strict=False):
            time.sleep(STEP_S)
        waited = 100 * loader.take_wait_s() / (time.perf_counter() - begin)
    yield line("data wait", waited, f"% of steps of {1e3 * STEP_S:.0f} ms, the first left out")
    packed, _ = consume(DataLoader(Blocks(store, BLOCK), batch_size=8, shuffle=True, num_workers=1))
    yield line("packed dataset behind a worker", packed / 1e6, "M tokens/s", "loader", packed / ours)
    if tokenizer_path is None:
        return
    inputs, tokens = consume(DataLoader(DocumentRows(texts * 4, tokenizer_path, BLOCK), batch_size=8, num_workers=1))
    yield line("one document a row, tokenised by a worker", inputs / 1e6, "M slots/s", real_tokens_per_s=round(tokens))
    yield line("loader against it", ours / inputs, "times its slots", real_tokens_ratio=round(ours / tokens))


def read_texts(source: Path) -> list[str]:
    opened = gzip.open if source.suffix == ".gz" else open
    with opened(source, "rt", encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]


def measure_tokenising(folder: Path, texts: list[str], tokenizer_path: Path) -> Iterator[dict[str, Any]]:
    """CPU time of prepare_data.py, its start taken off, against raw encode_batch_fast of the same texts."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["RAYON_NUM_THREADS"] = "1"
    raw = tokenizers.Tokenizer.from_file(str(tokenizer_path / "tokenizer.json"))
    begin = time.process_time()
    count = sum(len(one.ids) for at in range(0, len(texts), 256) for one in raw.encode_batch_fast(texts[at : at + 256]))
    raw_per_s = count / (time.process_time() - begin)
    yield line("encode_batch_fast", raw_per_s / 1e6, "M tokens/CPU s")
    sources = {"all": (texts, 8), "one": (texts[:1], 1)}
    for name, (chosen, pieces) in sources.items():
        path = folder / name
        path.mkdir()
        for piece in range(pieces):
            lines = [json.dumps({"id": f"{piece}-{at}", "text": text}) for at, text in enumerate(chosen[piece::pieces])]
            (path / f"{piece}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    start_cpu_s, start_s = prepare(folder / "out-0", folder / "one", tokenizer_path, 1)
    one_cpu_s, one_s = prepare(folder / "out-1", folder / "all", tokenizer_path, 1)
    _, two_s = prepare(folder / "out-2", folder / "all", tokenizer_path, 2)
    ours = count / (one_cpu_s - start_cpu_s)
    yield line("prepare_data, 1 worker", ours / 1e6, "M tokens/CPU s", "encode_batch_fast", ours / raw_per_s)
    speed_up = (one_s - start_s) / (two_s - start_s)
    yield line("prepare_data, 2 workers", count / (two_s - start_s) / 1e6, "M tokens/s", "1 worker", speed_up)


def prepare(destination: Path, source: Path, tokenizer_path: Path, workers: int) -> tuple[float, float]:
    """(CPU seconds, seconds) of one build."""
    command = [sys.executable, str(PREPARE), "--source", str(source), "--tokenizer_path", str(tokenizer_path)]
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        [*command, "--destination_path", str(destination), "--workers", str(workers), "--val_fraction", "0"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise BadInput(f"{PREPARE.name}: {done.stderr.strip().splitlines()[-1]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return cpu_s, time.perf_counter() - begin
