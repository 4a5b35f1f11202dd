"""The builder: each document once and in one split, each rejected line in the ledger, the same bytes after any kill."""

from __future__ import annotations

import contextlib
import gzip
import importlib.util
import io
import itertools
import json
import logging
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

import lit_gpt.prepare.store_builder
import lit_gpt.prepare.token_runs
from lit_gpt.cli import BadInput
from lit_gpt.data.token_store import ShardFile, TokenStore, document_ends, documents
from lit_gpt.data.tokenizer import Tokenizer
from lit_gpt.locks import host_name
from tests.support.odd_tokenizers import bpe, rules, write

NO_PROCESS = (1 << 22) + 1
"""Linux gives no process a higher number than 2^22."""
ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "scripts/prepare_data.py"
WORDS = ["Haus", "Baum", "Straße", "läuft", "über", "grün", "ist", "und", "der", "die", "nicht", "schön", "Füchse"]


def start(*argv: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(PROGRAM), *map(str, argv)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )


def run(*argv: object, code: int = 0) -> str:
    """The program in this process, as the __main__ that its workers import; what it prints, logs and refuses."""
    spec = importlib.util.spec_from_file_location("prepare_data", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    program.__spec__ = None  # as in a program started by its path
    said = io.StringIO()
    handler = logging.StreamHandler(said)
    logger = logging.getLogger()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        with contextlib.redirect_stdout(said), mock.patch.dict(sys.modules, {"__main__": program}):
            ended = program.main([str(word) for word in argv]) or 0
    except BadInput as error:
        ended = 2
        said.write(f"{error}\n")
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    assert ended == code, said.getvalue()
    return said.getvalue()


def arguments(source: Path, tokenizer: Path, out: Path, *more: object) -> list[object]:
    return ["--source", source, "--tokenizer_path", tokenizer, "--destination_path", out, "--workers", 1, *more]


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One token a byte: ids 2 to 257, after <s> and </s>."""
    folder = tmp_path_factory.mktemp("bytes")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({piece: number for number, piece in enumerate(["<s>", "</s>", *alphabet])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    return folder


def made_up(count: int, seed: int = 1) -> list[dict]:
    random_ = random.Random(seed)
    return [
        {"id": f"doc-{seed}-{number}", "text": " ".join(random_.choices(WORDS, k=random_.randint(3, 60)))}
        for number in range(count)
    ]


def lines_of(records: Iterable[dict]) -> bytes:
    return b"".join(json.dumps(record, ensure_ascii=False).encode() + b"\n" for record in records)


def write_zst(path: Path, data: bytes) -> None:
    with pa.CompressedOutputStream(str(path), "zstd") as file:
        file.write(data)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a file of each kind, 300 documents each; the .jsonl one is read in several pieces."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "a.jsonl").write_bytes(lines_of(made_up(300, 1)))
    (folder / "sub").mkdir()
    (folder / "sub/b.jsonl.gz").write_bytes(gzip.compress(lines_of(made_up(300, 2))))
    write_zst(folder / "c.jsonl.zst", lines_of(made_up(300, 3)))
    pq.write_table(pa.Table.from_pylist(made_up(300, 4)), folder / "d.parquet", row_group_size=100)
    (folder / "notes.txt").write_text("not a source")
    return folder


def read_all(folder: Path, tokenizer: Path) -> list[tuple[str, str, str, int]]:
    """(id, text, source, line) of every document of a split, in order; asserts that each ends with EOS."""
    coder = Tokenizer.from_folder(tokenizer)
    store = TokenStore.open(folder)
    found = []
    for shard in store.shards:
        ends = document_ends(store, shard).tolist()
        with ShardFile(folder, shard, store) as file:
            tokens = file.read(0, shard.tokens).tolist()
        for begin, record in zip([0, *ends], documents(store, shard).to_pylist(), strict=False):
            ids = tokens[begin : record["end"]]
            assert ids[-1] == coder.eos_id
            found.append((record["id"], coder.decode(ids[:-1]), record["source"], record["line"]))
    return found


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def data_of(folder: Path) -> dict[str, bytes]:
    """All bytes but the picture's."""
    return {name: data for name, data in snapshot(folder).items() if not name.endswith(".png")}


def rejects_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "rejects.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="session")
def built(corpus: Path, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("built") / "data"
    run(*arguments(corpus, tokenizer, out, "--shard_tokens", 40_000, "--val_fraction", 0.1))
    return out


def test_every_document_once_with_its_source(built: Path, tokenizer: Path) -> None:
    found = read_all(built / "train", tokenizer) + read_all(built / "val", tokenizer)
    names = {1: "a.jsonl", 2: "sub/b.jsonl.gz", 3: "c.jsonl.zst", 4: "d.parquet"}
    expected = [
        (record["id"], record["text"], name, line)
        for seed, name in names.items()
        for line, record in enumerate(made_up(300, seed), 1)
    ]
    assert sorted(found) == sorted(expected)
    assert TokenStore.open(built / "train").text_bytes == sum(
        len(text.encode()) for _, text, _, _ in read_all(built / "train", tokenizer)
    )


def test_shards_splits_and_order(built: Path, tokenizer: Path) -> None:
    train, val = TokenStore.open(built / "train"), TokenStore.open(built / "val")
    sizes = [shard.tokens for shard in train.shards]
    assert len(sizes) >= 4
    assert all(39_000 < size <= 40_000 for size in sizes[:-1])
    assert 80 < val.documents < 160  # 10 % of 1,200, give or take four standard deviations
    order = [id for id, *_ in read_all(built / "train", tokenizer)]
    ascending = sum(a < b for a, b in itertools.pairwise(order)) / len(order)
    assert 0.4 < ascending < 0.6  # shuffled
    assert not (built / "build").exists()
    assert (built / "lengths.png").read_bytes()[:4] == b"\x89PNG"


def test_summary_adds_up(built: Path) -> None:
    summary = json.loads((built / "summary.json").read_text())
    assert summary["ledger"] == {"lines": 1200, "documents": 1200, "rejects": {}}
    assert sum(split["documents"] for split in summary["splits"].values()) == 1200
    for name, split in summary["splits"].items():
        store = TokenStore.open(built / name)
        assert (split["dataset_id"], split["tokens"]) == (store.dataset_id, store.tokens)
        lengths = [b - a for shard in store.shards for ends in [document_ends(store, shard).tolist()]
                   for a, b in zip([0, *ends], ends, strict=False)]  # fmt: skip
        lengths.sort()
        stats = split["document_tokens"]
        assert (stats["min"], stats["max"]) == (lengths[0], lengths[-1])
        assert stats["median"] == lengths[(len(lengths) - 1) // 2]
        assert stats["mean"] == pytest.approx(sum(lengths) / len(lengths), abs=0.06)
        assert stats["histogram"] == [
            [low, high, sum(low <= length < high for length in lengths)] for low, high, _ in stats["histogram"]
        ]
        assert sum(count for *_, count in stats["histogram"]) == len(lengths)


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "run_bytes"), [(1, 3_000), (2, 20_000), (3, 1 << 30)])
def test_same_bytes_for_every_number_of_workers_and_run_size(
    built: Path, corpus: Path, tokenizer: Path, tmp_path: Path, workers: int, run_bytes: int
) -> None:
    more = ["--shard_tokens", 40_000, "--val_fraction", 0.1, "--run_bytes", run_bytes, "--workers", workers]
    run(*arguments(corpus, tokenizer, tmp_path / "data", *more))
    assert data_of(tmp_path / "data") == data_of(built)


def test_planning_in_small_ranges_gives_the_same_bytes(
    built: Path, corpus: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for a corpus whose indexes do not fit into memory."""
    monkeypatch.setattr(lit_gpt.prepare.token_runs, "MERGE_DOCUMENTS", 50)
    more = ["--shard_tokens", 40_000, "--val_fraction", 0.1, "--run_bytes", 10_000]
    run(*arguments(corpus, tokenizer, tmp_path / "data", *more))
    assert data_of(tmp_path / "data") == data_of(built)


@pytest.mark.slow
def test_keep_order(corpus: Path, tokenizer: Path, tmp_path: Path) -> None:
    more = ["--keep_order", "--shard_tokens", 40_000, "--run_bytes", 5_000, "--workers", 2, "--val_fraction", 0]
    run(*arguments(corpus, tokenizer, tmp_path / "data", *more))
    found = read_all(tmp_path / "data/train", tokenizer)
    # a.jsonl, c.jsonl.zst, d.parquet, sub/b.jsonl.gz: in order of path
    assert [id for id, *_ in found] == [record["id"] for seed in (1, 3, 4, 2) for record in made_up(300, seed)]
    assert not (tmp_path / "data/val").exists()


def test_seed_changes_order_and_split(built: Path, corpus: Path, tokenizer: Path, tmp_path: Path) -> None:
    more = ["--seed", 7, "--shard_tokens", 40_000, "--val_fraction", 0.1]
    run(*arguments(corpus, tokenizer, tmp_path / "data", *more))
    ours, theirs = ([id for id, *_ in read_all(folder / "train", tokenizer)] for folder in (tmp_path / "data", built))
    assert set(ours) != set(theirs)
    both = set(ours) & set(theirs)
    assert [id for id in ours if id in both] != [id for id in theirs if id in both]


def test_duplicate_text_never_on_both_sides(tokenizer: Path, tmp_path: Path) -> None:
    """60 texts, each under 10 ids: if documents were drawn singly, nearly every text would be in both splits."""
    texts = [record["text"] for record in made_up(60)]
    records = [{"id": f"{copy}-{number}", "text": text} for copy in range(10) for number, text in enumerate(texts)]
    (tmp_path / "a.jsonl").write_bytes(lines_of(records))
    run(*arguments(tmp_path / "a.jsonl", tokenizer, tmp_path / "data", "--val_fraction", 0.3))
    train = Counter(text for _, text, *_ in read_all(tmp_path / "data/train", tokenizer))
    val = Counter(text for _, text, *_ in read_all(tmp_path / "data/val", tokenizer))
    assert len(val) > 5
    assert not set(train) & set(val)
    assert set((train + val).values()) == {10}


@pytest.mark.parametrize("count", [2, 3, 10])
def test_tiny_corpus_gets_a_document_on_each_side(tokenizer: Path, tmp_path: Path, count: int) -> None:
    for fraction in (0.0001, 0.9999):
        (tmp_path / "a.jsonl").write_bytes(lines_of(made_up(count)))
        out = tmp_path / f"data{fraction}"
        run(*arguments(tmp_path / "a.jsonl", tokenizer, out, "--val_fraction", fraction))
        sizes = [TokenStore.open(out / split).documents for split in ("train", "val")]
        assert sorted(sizes)[0] == 1
        assert sum(sizes) == count


def test_one_document_is_training_data_only(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines_of(made_up(1)))
    assert "no validation data" in run(*arguments(tmp_path / "a.jsonl", tokenizer, tmp_path / "data"))
    assert TokenStore.open(tmp_path / "data/train").documents == 1
    assert not (tmp_path / "data/val").exists()


BAD_LINES = [
    (b'{"id": "x1", "text": ""}', "empty"),
    (b'{"id": "x2", "text": " \\n "}', "empty"),
    (b'{"id": "x3", "text": "cut', "bad JSON"),
    (b"[" * 100_000, "bad JSON"),
    (b'["a list"]', "bad JSON"),
    (b'{"id": "x4"}', "no text"),
    (b'{"id": "x5", "text": 5}', "no text"),
    (b'{"id": "x6", "text": "\xff\xfe"}', "bad UTF-8"),
    (b'{"id": "x7", "text": "\\ud83d allein"}', "lone surrogate"),
    (b'{"id": "x8", "text": "' + b"a" * (16 << 20) + b'"}', "too long"),
    (b'{"id": "x9", "text": "' + b"a" * (40 << 20) + b'"}', "too long"),
    (b'{"id": "doc-1-0", "text": "ein anderer Text"}', "duplicate id"),
]


@pytest.mark.parametrize("keep_order", [False, True])
def test_each_reject_is_counted_and_located(tokenizer: Path, tmp_path: Path, keep_order: bool) -> None:
    """Line 1 is good, then bad and good lines alternate: a bad line affects no other. Blank lines at the end."""
    good = [json.dumps(record).encode() for record in made_up(len(BAD_LINES) + 1)]
    lines = [good[0]]
    for (bad, _), record in zip(BAD_LINES, good[1:], strict=True):
        lines += [bad, record]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([*lines, b"", b" \t", b"\r", b""]))
    more = ["--max_reject_fraction", 0.5, "--val_fraction", 0, *(["--keep_order"] if keep_order else [])]
    said = run(*arguments(tmp_path / "a.jsonl", tokenizer, tmp_path / "data", *more))
    rejects = rejects_of(tmp_path / "data")
    assert [(reject["line"], reject["kind"]) for reject in rejects] == [
        (2 + 2 * number, kind) for number, (_, kind) in enumerate(BAD_LINES)
    ]
    assert {reject["file"] for reject in rejects} == {"a.jsonl"}
    assert rejects[-1]["detail"] == "first in a.jsonl line 1"
    found = read_all(tmp_path / "data/train", tokenizer)
    assert sorted(id for id, *_ in found) == sorted(record["id"] for record in made_up(len(good)))
    assert next(text for id, text, *_ in found if id == "doc-1-0") == made_up(1)[0]["text"]
    ledger = json.loads((tmp_path / "data/summary.json").read_text())["ledger"]
    assert ledger["lines"] == len(lines) == ledger["documents"] + sum(ledger["rejects"].values())
    assert "2 empty" in said


def test_parquet_rejects_are_located(tokenizer: Path, tmp_path: Path) -> None:
    texts = pa.array([b"gut", None, b"\xff", b"", b"auch gut"], pa.binary())
    raw = pa.Array.from_buffers(pa.string(), 5, texts.buffers())
    pq.write_table(pa.table({"id": pa.array([1, 2, 3, 4, 5]), "text": raw}), tmp_path / "a.parquet")
    run(*arguments(tmp_path / "a.parquet", tokenizer, tmp_path / "data", "--max_reject_fraction", 0.9))
    rejects = [(reject["line"], reject["kind"]) for reject in rejects_of(tmp_path / "data")]
    assert rejects == [(2, "no text"), (3, "bad UTF-8"), (4, "empty")]
    found = read_all(tmp_path / "data/train", tokenizer) + read_all(tmp_path / "data/val", tokenizer)
    assert sorted(found) == [("1", "gut", "a.parquet", 1), ("5", "auch gut", "a.parquet", 5)]


def cut_gz(data: bytes, path: Path) -> None:
    path.write_bytes(gzip.compress(data)[:-20])


def cut_zst(data: bytes, path: Path) -> None:
    write_zst(path, data)
    path.write_bytes(path.read_bytes()[:-20])


@pytest.mark.parametrize(("name", "write"), [("a.jsonl.gz", cut_gz), ("a.jsonl.zst", cut_zst)])
def test_archive_cut_short_is_located(
    tokenizer: Path, tmp_path: Path, name: str, write: Callable[[bytes, Path], None]
) -> None:
    """Random letters hardly compress: nearly all of the lines are there, and they are kept."""
    random_ = random.Random(0)
    records = [{"id": n, "text": "".join(random_.choices("abcdefghijklmnop", k=300))} for n in range(2000)]
    write(lines_of(records), tmp_path / name)
    said = run(*arguments(tmp_path / name, tokenizer, tmp_path / "data"), code=2)
    assert f"{name} cannot be read from line" in said
    run(*arguments(tmp_path / name, tokenizer, tmp_path / "data", "--allow_damaged_files"))
    (reject,) = rejects_of(tmp_path / "data")
    documents_ = json.loads((tmp_path / "data/summary.json").read_text())["ledger"]["documents"]
    assert (reject["file"], reject["kind"], reject["line"]) == (name, "cut short", documents_ + 1)
    assert 1200 < documents_ < 2000


def test_what_was_lost_with_allow_damaged_files_is_not_taken_without_it(tokenizer: Path, tmp_path: Path) -> None:
    """By a build that goes on, and by one that is finished."""
    source, out = tmp_path / "a.jsonl.gz", tmp_path / "data"
    cut_gz(lines_of(made_up(3000)), source)
    build = arguments(source, tokenizer, out, "--max_reject_fraction", 0)
    more = ["--allow_damaged_files"]
    assert "1 of " in run(*build, *more, code=2)  # all is tokenised, and one reject is too many
    assert f"{source} cannot be read from line" in run(*build, code=2)
    more += ["--max_reject_fraction", 0.01]
    assert "continuing the unfinished build" in run(*build, *more)
    assert "already holds this data set" in run(*build, *more)
    said = run(*build, code=2)
    assert f"made with --allow_damaged_files: 1 rejects in {out}/rejects.jsonl stand for what could not be read" in said


def test_repeated_sources_add_up(tokenizer: Path, tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / f"{name}.jsonl").write_bytes(lines_of([{"id": name, "text": f"Text {name}"}]))
    a, b, c = (tmp_path / f"{name}.jsonl" for name in "abc")
    run(*arguments(a, tokenizer, tmp_path / "data", "--source", b, c, "--val_fraction", 0))
    assert sorted(id for id, *_ in read_all(tmp_path / "data/train", tokenizer)) == ["a", "b", "c"]


def test_too_many_rejects_stop_the_build_and_a_higher_limit_goes_on(tokenizer: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "a.jsonl", tmp_path / "data"
    source.write_bytes(lines_of(made_up(97)) + b"{\n{}\n\n{\n")
    said = run(*arguments(source, tokenizer, out, "--max_reject_fraction", 0.02), code=2)
    assert "3 of 100 lines rejected" in said
    assert "2 bad JSON, 1 no text" in said
    assert "the first in a.jsonl line 98" in said
    assert [reject["line"] for reject in rejects_of(out)] == [98, 99, 101]
    assert not (out / "train/MANIFEST.json").exists()
    said = run(*arguments(source, tokenizer, out, "--max_reject_fraction", 0.03))
    assert "continuing the unfinished build" in said
    assert TokenStore.open(out / "train").documents + TokenStore.open(out / "val").documents == 97


def test_hopeless_input_is_stopped_before_its_end(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """4 MB without a field "text", stopped soon after the first piece of 1 MB."""
    monkeypatch.setattr(lit_gpt.prepare.store_builder, "CHECK_LINES", 1000)
    (tmp_path / "a.jsonl").write_bytes(b'{"id": 1, "content": "anderswo"}\n' * 120_000)
    said = run(*arguments(tmp_path / "a.jsonl", tokenizer, tmp_path / "data"), code=2)
    rejected, lines = (int(word) for word in said.split(" lines rejected")[0].split(" of "))
    assert rejected == lines < 70_000


def test_control_tokens_in_a_text_stay_text_and_bos_is_added_only_if_asked(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines_of([{"id": 1, "text": "a</s>b"}]))
    for flags, begin in ((["--add_bos"], [0]), ([], [])):
        out = tmp_path / f"data{len(flags)}"
        run(*arguments(tmp_path / "a.jsonl", tokenizer, out, "--val_fraction", 0, *flags))
        store = TokenStore.open(out / "train")
        with ShardFile(store.path, store.shards[0], store) as file:
            ids = file.read(0, store.tokens).tolist()
        assert ids == [*begin, *Tokenizer.from_folder(tokenizer).encode("a</s>b"), 1]
        assert len(ids) == 7 + len(begin)  # six bytes and the EOS


def test_field_names_and_missing_ids(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines_of([{"key": 7, "body": "eins"}, {"body": "zwei"}]))
    more = ["--text_field", "body", "--id_field", "key", "--val_fraction", 0]
    run(*arguments(tmp_path / "a.jsonl", tokenizer, tmp_path / "data", *more))
    assert sorted(id for id, *_ in read_all(tmp_path / "data/train", tokenizer)) == ["7", "a.jsonl:2"]


def test_document_longer_than_a_shard_or_a_part(tokenizer: Path, tmp_path: Path) -> None:
    """1.2 MB in lines of 12 bytes: encoded in parts where the tokenizer allows it, stored in one shard in any case."""
    text = "zwölf Bytes\n" * 100_000
    (tmp_path / "a.jsonl").write_bytes(lines_of([*made_up(3), {"id": "long", "text": text}]))
    run(*arguments(tmp_path / "a.jsonl", tokenizer, tmp_path / "data", "--val_fraction", 0, "--shard_tokens", 1000))
    found = {id: content for id, content, *_ in read_all(tmp_path / "data/train", tokenizer)}
    assert found["long"] == text
    assert len(found) == 4


def kill_when(process: subprocess.Popen[str], seen: Callable[[], bool]) -> bool:
    """SIGKILL the builder, but not its workers; False if it ended before."""
    while process.poll() is None:
        if seen():
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            return True
        time.sleep(0.001)
    return False


@pytest.mark.slow
def test_same_bytes_after_kills_at_every_stage(tokenizer: Path, tmp_path: Path) -> None:
    """Killed when the first run, a later run, the first shard and the last manifest appear; then run to its end."""
    source = tmp_path / "a.jsonl"
    source.write_bytes(lines_of(made_up(25_000)))  # 5 MB: five pieces
    more = ["--workers", 2, "--shard_tokens", 500_000, "--run_bytes", 1_000_000]
    run(*arguments(source, tokenizer, tmp_path / "whole", *more))
    out = tmp_path / "killed"

    def count(pattern: str) -> int:
        return len(list(out.glob(pattern)))

    moments = [
        lambda: (out / "build/request.json").exists(),
        lambda: count("build/runs/*.data*") >= 1,
        lambda: count("build/runs/*.json") >= 1,
        lambda: count("build/runs/*.json") >= 4,
        lambda: count("train/*.partial") >= 1,
        lambda: count("build/shards/*.json") >= 2,
        lambda: (out / "train/MANIFEST.json").exists(),
    ]
    killed = []
    for moment in moments:
        process = start(*arguments(source, tokenizer, out, *more))
        killed.append(kill_when(process, moment))
        if moment is not moments[-1]:
            assert not (out / "train/MANIFEST.json").exists()
    assert sum(killed) >= 5, killed
    run(*arguments(source, tokenizer, out, *more))
    assert data_of(out) == data_of(tmp_path / "whole")


@pytest.mark.slow
def test_files_that_a_killed_builder_was_writing_are_swept(tokenizer: Path, tmp_path: Path) -> None:
    """Names of today and of earlier versions, which read a number from every name in pieces/."""
    source, out = tmp_path / "a.jsonl", tmp_path / "data"
    source.write_bytes(lines_of(made_up(20_000)))
    assert kill_when(start(*arguments(source, tokenizer, out)), lambda: (out / "build/request.json").exists())
    for name in ("build/pieces/0.partial", "build/pieces/.0.host-1.partial", ".summary.json.host-1.partial"):
        (out / name).write_bytes(b"1")
    run(*arguments(source, tokenizer, out))
    names = sorted(path.name for path in out.iterdir())
    assert names == ["lengths.png", "rejects.jsonl", "summary.json", "train", "val"]


@pytest.mark.slow
def test_killed_worker_ends_the_build_with_a_reason(tokenizer: Path, tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_bytes(lines_of(made_up(25_000)))
    process = start(*arguments(source, tokenizer, tmp_path / "data", "--run_bytes", 100_000, "--workers", 2))
    runs = tmp_path / "data/build/runs"
    while not (names := list(runs.glob("*.json"))):
        assert process.poll() is None
        time.sleep(0.001)
    os.kill(int(names[0].name.split("-")[1]), signal.SIGKILL)  # a run is named after its worker
    _, errors = process.communicate()
    assert process.returncode == 1
    assert "a worker process ended with code -9" in errors


def test_finished_data_set_is_kept_and_other_requests_are_refused(tokenizer: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "a.jsonl", tmp_path / "data"
    source.write_bytes(lines_of(made_up(50)))
    run(*arguments(source, tokenizer, out))
    before = snapshot(out)
    (out / f".lengths.png.{host_name()}-{NO_PROCESS}.partial").write_bytes(b"")  # killed while it drew
    assert "already holds this data set" in run(*arguments(source, tokenizer, out))
    assert data_of(out) == {name: data for name, data in before.items() if not name.endswith(".png")}
    said = run(*arguments(source, tokenizer, out, "--seed", 5), code=2)
    assert "holds a finished data set made with other seed (0 there, 5 asked for)" in said
    source.write_bytes(lines_of(made_up(51)))
    assert "made with other sources" in run(*arguments(source, tokenizer, out), code=2)
    (out / "summary.json").write_text('{"request": {"bui')
    assert "summary.json is not JSON" in run(*arguments(source, tokenizer, out), code=2)


def test_build_inside_its_source_folder_does_not_read_itself(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines_of(made_up(20)))
    out = tmp_path / "data"
    run(*arguments(tmp_path, tokenizer, out))
    assert (out / "rejects.jsonl").exists()
    assert "already holds this data set" in run(*arguments(tmp_path, tokenizer, out))


MISTAKES = [
    ({"--source": "absent"}, "absent: there is no such file or folder"),
    ({"--source": "A.jsnl"}, "A.jsnl: there is no such file or folder; did you mean "),
    ({"--source": "store"}, "store/train is a token store: tokenised already"),
    ({"--source": "store/train/00000.tokens"}, "store/train is a token store: tokenised already"),
    ({"--source": "folder"}, "no file to read in folder"),
    ({"--source": "empty.jsonl"}, "the source is empty"),
    ({"--source": "a.doc"}, "a.doc is of no known kind: .jsonl"),
    ({"--source": "broken.parquet"}, "broken.parquet is not a Parquet file, or is cut short"),
    ({"--source": "other.parquet"}, "has no column 'text'. Columns: id, body"),
    ({"--tokenizer_path": "absent"}, "absent: there is no such folder"),
    ({"--tokenizer_path": "folder"}, "holds neither tokenizer.json nor tokenizer.model"),
    ({"--tokenizer_path": "losing"}, "characters such as 'A' would vanish from texts"),
    ({"--destination_path": "a.doc/data"}, "cannot write to --destination_path"),
    ({"--val_fraction": "1"}, "--val_fraction 1.0: must be at least 0 and below 1"),
    ({"--workers": "0"}, "--workers 0: must be at least 1"),
    ({"--seed": "-1"}, "--seed -1: must be at least 0"),
    ({"--colour": "red"}, "no flag --colour"),
]


@pytest.mark.parametrize(("changes", "message"), MISTAKES, ids=[message[:40] for _, message in MISTAKES])
def test_mistakes_get_one_line(tokenizer: Path, tmp_path: Path, changes: dict[str, str], message: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "store/train").mkdir(parents=True)
    for name in ("00000.tokens", "00000.docs.parquet"):
        (tmp_path / "store/train" / name).touch()
    (tmp_path / "a.jsonl").write_bytes(lines_of(made_up(5)))
    for name in ("empty.jsonl", "a.doc", "broken.parquet"):
        (tmp_path / name).write_bytes(b"")
    pq.write_table(pa.table({"id": ["1"], "body": ["x"]}), tmp_path / "other.parquet")
    write(tmp_path / "losing", rules(bpe(unk_token=None)))
    command = {"--source": "a.jsonl", "--tokenizer_path": str(tokenizer), "--destination_path": "data", **changes}
    paths = ("--source", "--tokenizer_path", "--destination_path")
    words = [[flag, tmp_path / value if flag in paths else value] for flag, value in command.items()]
    said = run(*(word for pair in words for word in pair), code=2)
    assert message in said
    assert len(said.splitlines()) == 1, said
    assert not (tmp_path / "data").exists()


def test_exit_code_and_one_line(tokenizer: Path, tmp_path: Path) -> None:
    process = start(*arguments(tmp_path / "absent", tokenizer, tmp_path / "data"))
    output, errors = process.communicate()
    assert (process.returncode, output) == (2, "")
    assert len(errors.splitlines()) == 1
    assert "absent: there is no such file or folder" in errors


@pytest.mark.slow
def test_second_builder_in_the_same_folder_is_refused(tokenizer: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "a.jsonl", tmp_path / "data"
    source.write_bytes(lines_of(made_up(20_000)))
    first = start(*arguments(source, tokenizer, out))
    while not (out / "build/request.json").exists():
        time.sleep(0.001)
    assert "another build is running" in run(*arguments(source, tokenizer, out), code=2)
    assert first.wait() == 0


def test_verify_names_shard_and_block(built: Path, tmp_path: Path) -> None:
    for name, data in snapshot(built).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    assert "whole" in run("verify", tmp_path)
    assert "whole" in run("verify", tmp_path / "train")
    path = tmp_path / "train/00002.tokens"
    data = bytearray(path.read_bytes())
    data[300] ^= 1
    path.write_bytes(data)
    cut = tmp_path / "train/00001.tokens"
    cut.write_bytes(cut.read_bytes()[:-1])
    said = run("verify", tmp_path, code=1)
    assert "00002.tokens: block 0" in said
    assert "00001.tokens: " in said
    assert "2 damaged" in said
    assert "no data set in" in run("verify", tmp_path / "absent", code=2)


@pytest.mark.slow
def test_german_text_with_the_published_tokenizer(shared: Path, tmp_path: Path) -> None:
    """All 524 documents of the handbook have the ids that the library gives."""
    source = shared / "data/debian-handbook-de.jsonl.gz"
    run(*arguments(source, shared / "tokenizer", tmp_path / "data", "--workers", 2, "--shard_tokens", 100_000))
    expected = {}
    for line in gzip.decompress(source.read_bytes()).splitlines():
        record = json.loads(line)
        expected[record["id"]] = record["text"]
    coder = Tokenizer.from_folder(shared / "tokenizer")
    ids = {id: [*coder.encode(text), 2] for id, text in expected.items()}
    found = {}
    for split in ("train", "val"):
        store = TokenStore.open(tmp_path / "data" / split)
        assert (store.vocab_size, store.tokenizer_fingerprint) == (32_010, coder.fingerprint)
        for shard in store.shards:
            with ShardFile(store.path, shard, store) as file:
                tokens = file.read(0, shard.tokens).tolist()
            ends = document_ends(store, shard).tolist()
            names = documents(store, shard)["id"].to_pylist()
            found |= {id: tokens[a:b] for id, a, b in zip(names, [0, *ends], ends, strict=False)}
    assert found == ids
