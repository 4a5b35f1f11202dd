"""Measure the data path against what it is compared with, all in one run; one JSON object a line.

    python scripts/benchmark_data.py [--source FILE.jsonl.gz --tokenizer_path DIR] [--tokens 33554432] [--work_dir DIR]

    reader         order, boundaries, checks and digest, against a plain memory-mapped gather to int64
    packing        padding and cut documents of each packing
    resume, query  opening at 15,000 shards; `step` and `doc` on a store of a million rows (both stores: hard links)
    loader         our prefetch thread, a packed dataset behind one DataLoader worker, and one document a row,
                   tokenised in the worker (the published loader's way; needs --source)
    tokenise       prepare_data.py against raw encode_batch_fast in CPU time (needs --source)

Documents of the reader's part are random ids with the lengths of German web text: log-normal, median 368. Every value
is the best of three; ratio is to the line whose `what` is the reference. Needs some 300 MB in --work_dir.
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
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lit_gpt.cli import BadInput, Parser, run_program
from lit_gpt.datapoint_log import DatapointLog
from lit_gpt.datapoint_query import Replay
from lit_gpt.packed_dataset import PackedDataset, StepLoader
from lit_gpt.row_reader import RowReader
from lit_gpt.token_store import (
    HEADER_BYTES,
    SHARD_TOKENS,
    Shard,
    TokenStore,
    document_ends,
    write_manifest,
    write_store,
)

BLOCK = 2048
STEP_ROWS = 256
STEP_S = 0.05
"""A step of STEP_ROWS rows of the smallest model takes an H100 longer."""
VOCABULARY = 32_010
MEDIAN_TOKENS, SIGMA = 368, 1.14
PREPARE = Path(__file__).with_name("prepare_data.py")


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--source", type=Path, help=".jsonl or .jsonl.gz with a field text")
    parser.add_argument("--tokenizer_path", help="tokenizer folder for --source")
    parser.add_argument("--tokens", type=int, default=1 << 25, help="tokens of the store that is read")
    parser.add_argument("--work_dir", type=Path, help="where to write (default: the system's temporary folder)")
    arguments = parser.parse_args()
    if (arguments.source is None) != (arguments.tokenizer_path is None):
        raise BadInput("--source and --tokenizer_path: give both or none")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=arguments.work_dir) as name:
        folder = Path(name)
        store = make_store(folder / "store", arguments.tokens)
        tokens_per_s = measure_reader(store)
        measure_packing(store)
        measure_scale(folder, store)
        measure_loaders(store, arguments, tokens_per_s)
        if arguments.source:
            measure_tokenising(folder, arguments)


def show(what: str, value: float, unit: str, reference: str = "", ratio: float | None = None, **more: Any) -> None:
    found = {"what": what, "value": float(f"{value:.4g}"), "unit": unit}
    if ratio is not None:
        found |= {"ratio": float(f"{ratio:.4g}"), "reference": reference}
    print(json.dumps(found | more), flush=True)


def fastest(action: Callable[[], Any], times: int = 3) -> float:
    """Seconds of the quickest of some runs: the others had company."""
    seconds = []
    for _ in range(times):
        begin = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


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


def measure_reader(store: TokenStore) -> float:
    """Plain gather, then our reader; our tokens a second with digest."""
    dataset = PackedDataset(store, BLOCK, 3)
    rows = dataset.rows_per_epoch
    maps = [np.memmap(store.path / f"{shard.name}.tokens", "<u2", "r", HEADER_BYTES) for shard in store.shards]
    places = dataset.reader.locate(np.arange(rows))
    wanted = list(zip(places.shard.tolist(), (places.row * BLOCK).tolist(), strict=True))

    def gather() -> None:
        for first in range(0, rows, 8):
            rows_of_batch = [maps[shard][start : start + BLOCK] for shard, start in wanted[first : first + 8]]
            np.stack([row if len(row) == BLOCK else np.resize(row, BLOCK) for row in rows_of_batch]).astype(np.int64)

    def read(digest: bool) -> None:
        tokens = np.empty((STEP_ROWS, BLOCK), np.uint16)
        targets = np.empty((STEP_ROWS, BLOCK), np.int32)
        for first in range(0, rows - STEP_ROWS + 1, STEP_ROWS):
            dataset.reader.fill(first + np.arange(STEP_ROWS), tokens, targets, digest=digest)

    read_rows = rows // STEP_ROWS * STEP_ROWS
    plain = rows * BLOCK / fastest(gather)
    show("gather", plain / 1e6, "M tokens/s")
    bare = read_rows * BLOCK / fastest(lambda: read(False))
    show("reader without digest", bare / 1e6, "M tokens/s", "gather", bare / plain)
    whole = read_rows * BLOCK / fastest(lambda: read(True))
    show("reader", whole / 1e6, "M tokens/s", "gather", whole / plain)
    show("digest", 100 * (bare / whole - 1), "% of the reader's time")
    slots = np.arange(1 << 20) % dataset.total_rows
    show("order", 1e6 * fastest(lambda: dataset.reader.locate(slots)) / len(slots), "us/row")
    return whole


def measure_packing(store: TokenStore) -> None:
    ends = [document_ends(store, shard) for shard in store.shards]
    lengths = np.concatenate([np.diff(end, prepend=0) for end in ends])
    crossed = sum(int(((end - 1) // BLOCK != (np.append(0, end[:-1])) // BLOCK).sum()) for end in ends)
    for packing in ("window", "bestfit", "pad"):
        begin = time.perf_counter()
        rows = RowReader([store], BLOCK, 3, packing=packing).rows_per_epoch
        cut = crossed if packing == "window" else int((lengths > BLOCK).sum())
        show(
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


def measure_scale(folder: Path, store: TokenStore) -> None:
    """A resume at 15,000 shards, and questions to a store of a million rows."""
    large = linked_store(folder / "large", store, 15_000, own_ids=False)

    def resume() -> None:
        dataset = PackedDataset(TokenStore.open(large.path), BLOCK, 3, max_epochs=9)
        with StepLoader(
            dataset, global_batch_size=STEP_ROWS, micro_batch_size=8, rank=0, world_size=4,
            first_slot=dataset.total_rows // 7 * 5, max_steps=1,
        ) as loader:  # fmt: skip
            next(loader)

    show("first step after a resume at 15,000 shards", fastest(resume), "s")
    template = write_store(
        folder / "template", random_documents(SHARD_TOKENS), tokenizer_fingerprint="benchmark", vocab_size=VOCABULARY,
        bos_id=1, eos_id=2,
    )  # fmt: skip
    million = linked_store(folder / "million", template, 31, own_ids=True)
    dataset = PackedDataset(million, BLOCK, 3)
    rows, steps = 1024, dataset.total_rows // 1024
    details = {"world_size": 4, "micro_batch_size": 8, "train_data_dir": str(million.path)}
    facts = {**dataset.reader.facts(), "global_batch_size": rows}
    with DatapointLog.open(folder / "run" / "datapoints", facts, details=details) as log:
        for step in range(1, steps + 1):
            log.append(step, (step - 1) * rows, rows, rows * BLOCK - 3000, (1 << 64) - step)
        log_bytes = log.flush_and_fsync().bytes
    show("log", 100 * log_bytes / (steps * rows * BLOCK * 2), "% of the token bytes", rows=dataset.total_rows)
    questions: dict[str, Callable[[Replay], Any]] = {
        "step": lambda replay: replay.step(steps // 3),
        "doc": lambda replay: replay.document("17-00004711"),
    }
    for name, ask in questions.items():
        begin = time.perf_counter()
        ask(Replay(folder / "run"))
        first_s = time.perf_counter() - begin
        answer_s = fastest(lambda ask=ask: ask(Replay(folder / "run")))  # type: ignore[misc]
        show(f"query {name}", 1e3 * answer_s, "ms", first_ms=round(1e3 * first_s))


class Blocks(Dataset[torch.Tensor]):
    """A classic packed dataset: rows of a memory map, cut wherever they fall."""

    def __init__(self, store: TokenStore) -> None:
        self.maps = [np.memmap(store.path / f"{shard.name}.tokens", "<u2", "r", HEADER_BYTES) for shard in store.shards]
        self.rows = [
            (shard, row * BLOCK) for shard, entry in enumerate(store.shards) for row in range(entry.tokens // BLOCK)
        ]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> torch.Tensor:
        shard, start = self.rows[index]
        return torch.from_numpy(self.maps[shard][start : start + BLOCK].astype(np.int64))


class DocumentRows(IterableDataset[torch.Tensor]):
    """The published loader's way: documents tokenised as they come, cut into chunks of BLOCK + 2, the rest padded."""

    def __init__(self, texts: list[str], tokenizer_path: str) -> None:
        self.texts, self.tokenizer_path = texts, tokenizer_path

    def __iter__(self) -> Iterator[torch.Tensor]:
        from lit_gpt.tokenizer import Tokenizer

        tokenizer = Tokenizer.from_folder(self.tokenizer_path)
        for text in self.texts:
            ids = [*tokenizer.encode(text), tokenizer.eos_id]
            for start in range(0, len(ids), BLOCK + 2):
                row = torch.full((BLOCK + 2,), -1, dtype=torch.int64)
                part = torch.tensor(ids[start : start + BLOCK + 2])
                row[: len(part)] = part
                yield row


def consume(batches: Iterable[torch.Tensor]) -> tuple[float, float]:
    """(slots, real tokens) a second, from the first batch on: the worker's start does not count."""
    slots = tokens = 0
    begin = None
    for batch in batches:
        if begin is None:
            begin = time.perf_counter()
            continue
        slots += batch.numel()
        tokens += int((batch >= 0).sum())
    seconds = time.perf_counter() - (begin or 0.0)
    return slots / seconds, tokens / seconds


def measure_loaders(store: TokenStore, arguments: Namespace, reader_tokens_per_s: float) -> None:
    def open_loader() -> StepLoader:
        dataset = PackedDataset(store, BLOCK, 3)
        return StepLoader(dataset, global_batch_size=STEP_ROWS, micro_batch_size=8, rank=0, world_size=1)

    def all_steps() -> None:
        with open_loader() as loader:
            for _ in loader:
                pass

    rows = PackedDataset(store, BLOCK, 3).total_rows // STEP_ROWS * STEP_ROWS
    ours = rows * BLOCK / fastest(all_steps)
    show("loader", ours / 1e6, "M tokens/s", "reader", ours / reader_tokens_per_s)
    with open_loader() as loader:
        next(loader)
        loader.take_wait_s()
        begin = time.perf_counter()
        for _ in loader:
            time.sleep(STEP_S)
        waited = 100 * loader.take_wait_s() / (time.perf_counter() - begin)
    show("data wait", waited, f"% of steps of {1e3 * STEP_S:.0f} ms, the first left out")
    packed, _ = consume(DataLoader(Blocks(store), batch_size=8, shuffle=True, num_workers=1))
    show("packed dataset behind a worker", packed / 1e6, "M tokens/s", "loader", packed / ours)
    if not arguments.source:
        return
    texts = read_texts(arguments.source)
    slots, tokens = consume(DataLoader(DocumentRows(texts * 4, arguments.tokenizer_path), batch_size=8, num_workers=1))
    show("one document a row, tokenised by a worker", slots / 1e6, "M slots/s", real_tokens_per_s=round(tokens))
    show("loader against it", ours / slots, "times its slots", real_tokens_ratio=round(ours / tokens))


def read_texts(source: Path) -> list[str]:
    opened = gzip.open if source.suffix == ".gz" else open
    with opened(source, "rt", encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]


def measure_tokenising(folder: Path, arguments: Namespace, copies: int = 40) -> None:
    """CPU time of prepare_data.py, its start taken off, against raw encode_batch_fast of the same texts."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["RAYON_NUM_THREADS"] = "1"
    from tokenizers import Tokenizer

    texts = read_texts(arguments.source) * copies
    raw = Tokenizer.from_file(str(Path(arguments.tokenizer_path) / "tokenizer.json"))
    begin = time.process_time()
    count = sum(len(one.ids) for at in range(0, len(texts), 256) for one in raw.encode_batch_fast(texts[at : at + 256]))
    raw_per_s = count / (time.process_time() - begin)
    show("encode_batch_fast", raw_per_s / 1e6, "M tokens/CPU s")
    sources = {"all": (texts, 8), "one": (texts[:1], 1)}
    for name, (chosen, pieces) in sources.items():
        path = folder / name
        path.mkdir()
        for piece in range(pieces):
            lines = [json.dumps({"id": f"{piece}-{at}", "text": text}) for at, text in enumerate(chosen[piece::pieces])]
            (path / f"{piece}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    start_cpu_s, start_s = prepare(folder / "out-0", folder / "one", arguments.tokenizer_path, 1)
    one_cpu_s, one_s = prepare(folder / "out-1", folder / "all", arguments.tokenizer_path, 1)
    _, two_s = prepare(folder / "out-2", folder / "all", arguments.tokenizer_path, 2)
    ours = count / (one_cpu_s - start_cpu_s)
    show("prepare_data, 1 worker", ours / 1e6, "M tokens/CPU s", "encode_batch_fast", ours / raw_per_s)
    speed_up = (one_s - start_s) / (two_s - start_s)
    show("prepare_data, 2 workers", count / (two_s - start_s) / 1e6, "M tokens/s", "1 worker", speed_up)


def prepare(destination: Path, source: Path, tokenizer_path: str, workers: int) -> tuple[float, float]:
    """(CPU seconds, seconds) of one build."""
    command = [sys.executable, str(PREPARE), "--source", str(source), "--tokenizer_path", tokenizer_path]
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


if __name__ == "__main__":
    run_program(main)
