"""scripts/datapoints.py, compared with brute force over two epochs, crashes and resumes on other numbers of ranks."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from lit_gpt.checkpoint.checkpoint import write_initial
from lit_gpt.cli import BadInput
from lit_gpt.config import Config
from lit_gpt.data.loader import PackedDataset, StepLoader
from lit_gpt.data.token_store import HEADER_BYTES, TokenStore, document_ends, documents, write_store
from lit_gpt.datapoints.attempts import Mark, read_attempts, write_attempts
from lit_gpt.datapoints.log import DatapointLog
from lit_gpt.datapoints.query import Replay
from scripts.datapoints import main
from tests.support.small_store import make_store, shard_tokens

ROOT = Path(__file__).resolve().parents[2]
BLOCK = 32
BATCH = 8

RANK = """
import json, sys
from pathlib import Path
from lit_gpt.data.loader import PackedDataset, StepLoader
from lit_gpt.data.token_store import TokenStore
rank, world, first = map(int, sys.argv[2:])
dataset = PackedDataset(TokenStore.open(sys.argv[1]), 32, 7, max_epochs=2)
sizes = dict(global_batch_size=8, micro_batch_size=2)
with StepLoader(dataset, rank=rank, world_size=world, first_slot=first, **sizes) as loader:
    for step in loader:
        print(json.dumps([step.first_slot, step.targets, step.digest]), flush=True)
"""


def trained(store: TokenStore, world_size: int, first_slot: int) -> list[tuple[int, int, int]]:
    """(first slot, targets, digest) of each step, from `world_size` independent processes."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(store.path), *map(str, (rank, world_size, first_slot))],
            stdout=subprocess.PIPE, env=environment,
        )
        for rank in range(world_size)
    ]  # fmt: skip
    ranks = [[json.loads(line) for line in process.communicate()[0].splitlines()] for process in processes]
    assert all(process.returncode == 0 for process in processes)
    return [
        (parts[0][0], sum(part[1] for part in parts), sum(part[2] for part in parts) % 2**64)
        for parts in zip(*ranks, strict=True)
    ]


class Run:
    """A run folder, written as the trainer writes it."""

    def __init__(self, folder: Path, store: TokenStore, packing: str = "window") -> None:
        self.folder, self.store = folder, store
        self.dataset = PackedDataset(store, BLOCK, 7, packing=packing, max_epochs=2)

    def attempt(self, world_size: int, steps: Sequence[int], parent: Mark | None = None) -> Mark:
        """Train `steps`; returns the mark after the last one."""
        details = {
            "world_size": world_size, "micro_batch_size": 2, "train_data_dir": str(self.store.path),
            "tokenizer_path": None,
        }  # fmt: skip
        slot_facts = {**self.dataset.slot_facts(), "global_batch_size": BATCH}
        with DatapointLog.open(self.folder / "datapoints", slot_facts, parent=parent, details=details) as log:
            for step in steps:
                log.append(step, (step - 1) * BATCH, BATCH, *self.evidence(step))
            return log.flush_and_fsync()

    def evidence(self, step: int) -> tuple[int, int]:
        with StepLoader(
            self.dataset, global_batch_size=BATCH, micro_batch_size=BATCH, rank=0, world_size=1,
            first_slot=(step - 1) * BATCH, max_steps=1,
        ) as loader:  # fmt: skip
            (only,) = loader
        return only.targets, only.digest

    @property
    def last_step(self) -> int:
        return self.dataset.total_rows // BATCH

    def answer(self, capsys: pytest.CaptureFixture[str], *query: str) -> tuple[int, list[dict]]:
        code = main([*query, "--run_dir", str(self.folder), "--json"])
        return code, [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def brute_parts(run: Run) -> Iterator[tuple[int, int, int, str, int, int]]:
    """(step, row, epoch, document, start, length) of a run packed by window, found token by token, given the order."""
    owners = []
    for shard in run.store.shards:
        ends, ids = document_ends(run.store, shard).tolist(), documents(run.store, shard)["id"].to_pylist()
        begins = [0, *ends[:-1]]
        owners.append(
            [(name, at) for name, begin, end in zip(ids, begins, ends, strict=True) for at in range(end - begin)]
        )
    for slot in range(run.last_step * BATCH):
        place = run.dataset.orders[0].locate(slot)
        owner = owners[int(place.shard)][:-1]
        row = owner[int(place.row) * BLOCK : (int(place.row) + 1) * BLOCK]
        for name in dict.fromkeys(name for name, _ in row):
            tokens = [at for owned, at in row if owned == name]
            yield slot // BATCH + 1, slot % BATCH, int(place.epoch), name, tokens[0], len(tokens)


def handbook(shared: Path, path: Path) -> TokenStore:
    """The first 60 documents of Debian's handbook, tokenised, in shards of 6,000 tokens."""
    from lit_gpt.data.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_folder(shared / "tokenizer")
    with gzip.open(shared / "data" / "debian-handbook-de.jsonl.gz", "rt", encoding="utf-8") as file:
        records = [json.loads(next(file)) for _ in range(60)]
    return write_store(
        path,
        [(record["id"], [*tokenizer.encode(record["text"]), tokenizer.eos_id]) for record in records],
        tokenizer_fingerprint=tokenizer.fingerprint, vocab_size=tokenizer.vocab_size, bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id, shard_tokens=6000,
    )  # fmt: skip


def train_in_three_attempts(run: Run) -> None:
    """4 ranks, saved in epoch 0, crash; 2 ranks, saved in epoch 1, crash; 1 rank to the end."""
    middle, late = run.last_step // 3, 2 * run.last_step // 3
    first = run.attempt(4, range(1, middle + 1))
    run.attempt(4, range(middle + 1, middle + 4), first)
    second = run.attempt(2, range(middle + 1, late + 1), first)
    run.attempt(1, range(late + 1, run.last_step + 1), second)


def check_against_brute_force(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    expected = list(brute_parts(run))
    assert {part[2] for part in expected} == {0, 1}
    middle, late = run.last_step // 3, 2 * run.last_step // 3
    for step in (1, middle, middle + 1, late + 1, run.last_step):
        code, found = run.answer(capsys, "step", str(step))
        assert code == 0
        keys = ("step", "row", "epoch", "document", "start", "length")
        assert [tuple(part[key] for key in keys) for part in found] == [part for part in expected if part[0] == step]
        world_size = 4 if step <= middle else 2 if step <= late else 1
        assert {part["rank"] for part in found} == set(range(world_size))
    for name in sorted({part[3] for part in expected})[::7]:
        _, found = run.answer(capsys, "doc", name)
        parts = [(part["step"], part["row"], part["epoch"], part["start"], part["length"]) for part in found]
        assert sorted(parts) == sorted(part[:3] + part[4:] for part in expected if part[3] == name)
    assert run.answer(capsys, "verify") == (
        0, [{"steps_to": run.last_step, "rows": run.last_step * BATCH, "contradictions": 0}],
    )  # fmt: skip
    table = run.folder / "all.parquet"
    assert main(["export", str(table), "--run_dir", str(run.folder)]) == 0
    capsys.readouterr()
    columns = pq.read_table(table).to_pydict()
    exported = zip(*(columns[name] for name in ("step", "row", "document", "start", "length")), strict=True)
    assert list(exported) == [part[:2] + part[3:] for part in expected]


def test_answers_equal_brute_force_on_made_documents(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(tmp_path / "run", make_store(tmp_path / "store", 60))
    train_in_three_attempts(run)
    check_against_brute_force(run, capsys)


@pytest.mark.slow
def test_answers_equal_brute_force_on_the_handbook(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(tmp_path / "run", handbook(shared, tmp_path / "store"))
    train_in_three_attempts(run)
    check_against_brute_force(run, capsys)
    main(["step", "1", "--run_dir", str(run.folder), "--text", "--json", "--tokenizer_path", str(shared / "tokenizer")])
    first = json.loads(capsys.readouterr().out.splitlines()[0])
    with gzip.open(shared / "data" / "debian-handbook-de.jsonl.gz", "rt", encoding="utf-8") as file:
        texts = {record["id"]: record["text"] for record in map(json.loads, file)}
    assert first["text"].strip() in texts[first["document"]]
    assert len(first["text"]) > 10


@pytest.mark.parametrize("packing", ["bestfit", "pad"])
def test_other_packings_verify_and_find_every_document_twice(
    tmp_path: Path, packing: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(tmp_path / "run", make_store(tmp_path / "store", 60), packing)
    run.attempt(2, range(1, run.last_step + 1))
    assert run.answer(capsys, "verify")[0] == 0
    for shard in run.store.shards:
        ends = document_ends(run.store, shard)
        for name, length in zip(documents(run.store, shard)["id"].to_pylist(), np.diff(ends, prepend=0), strict=True):
            _, parts = run.answer(capsys, "doc", name)
            first = [part for part in parts if part["epoch"] == 0]
            assert sum(part["length"] for part in first) == length  # epoch 1 lacks what no longer fills a step


@pytest.mark.slow
def test_one_two_and_four_processes_give_the_same_digests(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", 40)
    steps = 2 * PackedDataset(store, BLOCK, 7).rows_per_epoch // BATCH
    whole = trained(store, 1, 0)
    assert len(whole) == steps
    assert trained(store, 2, 0) == whole
    assert trained(store, 4, 3 * BATCH) == whole[3:]


TRAINER = """
import json, os, random, sys, time
from pathlib import Path
import numpy as np
from lit_gpt.datapoints.attempts import Mark
from lit_gpt.datapoints.log import DatapointLog
from lit_gpt.data.row_reader import RowReader
from lit_gpt.data.token_store import TokenStore
folder, checkpoint = Path(sys.argv[2]), Path(sys.argv[2]) / "checkpoint.json"
reader = RowReader([TokenStore.open(sys.argv[1])], 32, 7, max_epochs=2)
saved = json.loads(checkpoint.read_text()) if checkpoint.exists() else {"step": 0, "slot": 0, "mark": None}
parent = Mark(**saved["mark"]) if saved["mark"] else None
details = {"world_size": 1, "micro_batch_size": 8, "train_data_dir": sys.argv[1]}
log = DatapointLog.open(folder / "datapoints", reader.slot_facts(), parent=parent, details=details)
tokens, targets = np.empty((8, 32), reader.dtype), np.empty((8, 32), np.int32)
step, slot = saved["step"], saved["slot"]
print("ready", flush=True)
while slot + 8 <= reader.total_rows:
    filled = reader.fill(slot + np.arange(8), tokens, targets)
    step += 1
    log.append(step, slot, 8, int((targets >= 0).sum()), filled.digest)
    slot += 8
    if step % 3 == 0:
        content = {"step": step, "slot": slot, "mark": log.flush_and_fsync()._asdict()}
        partial = checkpoint.with_suffix(".partial")
        partial.write_text(json.dumps(content))
        os.replace(partial, checkpoint)
    time.sleep(float(sys.argv[3]))
"""


def train(store: TokenStore, folder: Path, pause_s: float, kill_after_s: float | None) -> None:
    folder.mkdir(exist_ok=True)
    process = subprocess.Popen(
        [sys.executable, "-c", TRAINER, str(store.path), str(folder), str(pause_s)],
        stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    if kill_after_s is not None:
        time.sleep(kill_after_s)
        process.kill()
    assert process.wait() == (0 if kill_after_s is None else -9)


@pytest.mark.slow
@pytest.mark.parametrize("_", [0, *(pytest.param(number, marks=pytest.mark.long) for number in range(1, 40))])
def test_kills_at_random_steps_change_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str], _: int) -> None:
    store = make_store(tmp_path / "store", 240)  # 90 steps or so of 0.01 s: five lives of at most 0.15 s do not end it
    train(store, tmp_path / "unbroken", 0, None)
    for kill_after_s in np.random.default_rng().uniform(0, 0.15, 5).tolist():
        train(store, tmp_path / "killed", 0.01, kill_after_s)
    train(store, tmp_path / "killed", 0, None)
    killed = Run(tmp_path / "killed", store)
    assert len(Replay(killed.folder).record.attempts) == 6
    code, (answer,) = killed.answer(capsys, "diff", str(tmp_path / "unbroken"))
    assert (code, answer) == (0, {"first_difference": None, "common_steps": killed.last_step})
    assert killed.answer(capsys, "verify")[0] == 0


def test_verify_finds_a_flipped_token(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(tmp_path / "run", make_store(tmp_path / "store", 60))
    run.attempt(1, range(1, run.last_step // 2))
    place = run.dataset.locate(np.array([20]))
    shard, token = int(place.shard[0]), int(place.row[0]) * BLOCK + 5
    path = run.store.path / f"{run.store.shards[shard].name}.tokens"
    raw = bytearray(path.read_bytes())
    raw[HEADER_BYTES + 2 * token] ^= 1
    path.write_bytes(raw)
    code, lines = run.answer(capsys, "verify")
    assert code == 1
    assert len(lines) == 2
    assert lines[0]["contradiction"].startswith("step 3: digest ")
    assert f"damaged: {path}: block 0" in lines[0]["contradiction"]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def without_end_mark(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


def unreadable(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize(
    ("ending", "damage", "message"),
    [
        ("tokens", cut, "bytes where"),
        ("tokens", without_end_mark, "its end mark is missing"),
        ("tokens", Path.unlink, "missing, and its manifest names it"),
        ("docs.parquet", unreadable, "do not hash to"),
    ],
)
def test_verify_tells_of_data_that_cannot_be_read_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], ending: str, damage: Callable[[Path], None], message: str
) -> None:
    run = Run(tmp_path / "run", make_store(tmp_path / "store", 60))
    run.attempt(1, range(1, run.last_step // 2))
    path = run.store.path / f"{run.store.shards[0].name}.{ending}"
    damage(path)
    code, lines = run.answer(capsys, "verify")
    told = [line["contradiction"] for line in lines[:-1] if str(path) in line["contradiction"]]
    assert code == 1
    assert len(told) == 1
    assert message in told[0]
    if ending != "tokens":  # documents and their places are answered without the tokens
        with pytest.raises(BadInput, match=f"damaged: {path}: "):
            main(["export", str(tmp_path / "t.parquet"), "--run_dir", str(run.folder), "--index_dir", str(tmp_path)])


@pytest.mark.parametrize("query", [["verify"], ["step", "1"], ["doc", "1"], ["diff", "$RUN"], ["export", "t.parquet"]])
def test_a_log_without_its_steps_gets_one_line(tmp_path: Path, query: list[str]) -> None:
    run = Run(tmp_path / "run", make_store(tmp_path / "store", 30))
    run.attempt(1, [1, 2])
    steps = run.folder / "datapoints" / "steps.jsonl"
    words = [str(run.folder) if word == "$RUN" else word for word in query]
    steps.unlink()
    with pytest.raises(BadInput, match=r"steps\.jsonl is missing: no step is logged yet, or it was removed"):
        main([*words, "--run_dir", str(run.folder)])
    os.mkfifo(steps)
    with pytest.raises(BadInput, match=r"steps\.jsonl is no regular file"):
        main([*words, "--run_dir", str(run.folder)])


def saved(run: Run, mark: Mark) -> None:
    """A checkpoint without weights."""
    path = run.folder / f"iter-{mark.step:08d}-ckpt.pth"
    facts = {"step": mark.step, "slot": 0, "tokens": 0, "settings": {}, "datapoint_log": mark._asdict()}
    write_initial(path, Config.from_name("debug"), [], facts)


DAMAGE = {
    "head": lambda lines: lines[2:],
    "head, without a checkpoint": lambda lines: lines[2:],
    "tail": lambda lines: lines[:-2],
    "hole": lambda lines: lines[:4] + lines[6:],
    "zeroed": lambda lines: [*lines[:4], b"\0" * len(lines[4]), *lines[5:]],
    "digest": lambda lines: [*lines[:4], lines[4].replace(b'"rows":8', b'"rows":8 ')[:-1] + b"\n", *lines[5:]],
    "other run's": lambda lines: [line.replace(b'"attempt":0', b'"attempt": 0') for line in lines],
    "everything": lambda lines: [],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_verify_finds_a_log_that_is_not_what_the_checkpoints_saw(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    run = Run(tmp_path / "run", make_store(tmp_path / "store", 60))
    middle = run.attempt(1, range(1, 7))
    last = run.attempt(1, range(7, 11), middle)
    if "without" not in damage:
        saved(run, middle)
        saved(run, last)
    assert run.answer(capsys, "verify") == (0, [{"steps_to": 10, "rows": 80, "contradictions": 0}])
    log = run.folder / "datapoints" / "steps.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(DAMAGE[damage](lines)))
    code, found = run.answer(capsys, "verify")
    assert code == 1
    said = found[0]["contradiction"]
    size = log.stat().st_size
    if damage in ("tail", "everything"):
        short = last if damage == "tail" else middle
        assert said.startswith(f"{log} is cut: it has {size} bytes, and had {short.bytes} at step {short.step}, says")
    else:
        named = "attempt 1" if "without" in damage else "iter-00000006-ckpt.pth"
        assert said.startswith(
            f"{log} does not begin with the {middle.bytes} bytes that it had at step 6, says {named}"
        )


def test_verify_finds_a_cut_head_without_any_mark(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(tmp_path / "run", make_store(tmp_path / "store", 60))
    run.attempt(1, range(1, 7))
    log = run.folder / "datapoints" / "steps.jsonl"
    log.write_bytes(b"".join(log.read_bytes().splitlines(keepends=True)[3:]))
    code, found = run.answer(capsys, "verify")
    assert (code, found[0]["contradiction"]) == (1, "step 1 is missing: the log goes from step 0 to step 4")


def test_the_mark_of_another_run_from_which_this_one_began_is_no_contradiction(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = make_store(tmp_path / "store", 60)
    other, run = Run(tmp_path / "other", store), Run(tmp_path / "run", store)
    mark = other.attempt(1, range(1, 5))
    run.attempt(1, range(5, 9), mark)
    saved(run, mark)  # its checkpoint was copied too
    assert run.answer(capsys, "verify") == (0, [{"steps_to": 8, "rows": 64, "contradictions": 0}])
    saved(run, mark._replace(step=8))
    damaged = run.folder / "iter-00000008-ckpt.pth" / "run.json"
    damaged.write_bytes(damaged.read_bytes().replace(mark.xxh3[:5].encode(), b"00000"))  # accuses the log
    assert main(["verify", "--run_dir", str(run.folder)]) == 0
    said = capsys.readouterr()
    assert f"no witness: {damaged} is corrupt" in said.err
    assert said.out == "0 contradictions up to step 8, 64 rows; compared with the marks of 1 checkpoints\n"


def test_verify_finds_a_swapped_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two rows of a shard are swapped, and its hashes and manifest written again to match."""
    store = make_store(tmp_path / "store", 60)
    run = Run(tmp_path / "run", store)
    run.attempt(1, range(1, run.last_step // 2))
    tokens = [shard_tokens(store, number) for number in range(len(store.shards))]
    one, two = tokens[0][BLOCK : 2 * BLOCK], tokens[0][3 * BLOCK : 4 * BLOCK]
    tokens[0][BLOCK : 2 * BLOCK], tokens[0][3 * BLOCK : 4 * BLOCK] = two, one
    everything, ids, begin = list(itertools.chain(*tokens)), [], 0
    ends = np.cumsum([end for shard in store.shards for end in np.diff(document_ends(store, shard), prepend=0)])
    for number, end in enumerate(ends.tolist()):
        ids.append((f"doc-{number}", everything[begin:end]))
        begin = end
    moved = write_store(
        tmp_path / "moved", ids, tokenizer_fingerprint="test", vocab_size=1000, bos_id=None, eos_id=2, shard_tokens=500
    )
    with pytest.raises(BadInput, match="is not the data of attempt 0"):
        main(["verify", "--run_dir", str(run.folder), "--data_dir", str(moved.path)])
    (attempt,) = read_attempts(run.folder / "datapoints")
    forged = attempt._replace(
        facts={**attempt.facts, "datasets": [moved.dataset_id]},
        details={**attempt.details, "train_data_dir": str(moved.path)},
    )
    assert write_attempts(run.folder / "datapoints", [forged])
    code, lines = run.answer(capsys, "verify")
    assert code == 1
    assert all("its shards are whole: the run read other data" in line["contradiction"] for line in lines[:-1])
    assert 1 <= len(lines) - 1 <= 4  # the two rows, and the two before them, which end with their first tokens


def test_verify_finds_a_skipped_step_unless_it_is_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(tmp_path / "run", make_store(tmp_path / "store", 60))
    run.attempt(1, [1, 2, 3, 5, 6])
    code, lines = run.answer(capsys, "verify")
    assert code == 1
    assert lines[0] == {"contradiction": "step 4 is missing: the log goes from step 3 to step 5"}
    other = Run(tmp_path / "other", run.store)
    mark = other.attempt(1, [1, 2, 3])
    slot_facts = {**other.dataset.slot_facts(), "global_batch_size": BATCH}
    details = {"world_size": 1, "micro_batch_size": 2, "train_data_dir": str(run.store.path)}
    with DatapointLog.open(other.folder / "datapoints", slot_facts, parent=mark, details=details) as log:
        log.deviation("skipped", 4, reason="gradient norm")
        log.append(5, 4 * BATCH, BATCH, *other.evidence(5))
    assert other.answer(capsys, "verify")[0] == 0


def test_diff_names_the_first_step_that_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = make_store(tmp_path / "store", 60)
    unbroken, resumed = Run(tmp_path / "a", store), Run(tmp_path / "b", store)
    unbroken.attempt(4, range(1, 13))
    mark = resumed.attempt(4, range(1, 6))
    resumed.attempt(4, range(6, 9), mark)
    resumed.attempt(2, range(6, 13), mark)
    code, (answer,) = unbroken.answer(capsys, "diff", str(resumed.folder))
    assert (code, answer) == (0, {"first_difference": None, "common_steps": 12})
    other = Run(tmp_path / "c", store)
    other.dataset = PackedDataset(store, BLOCK, 8)
    other.attempt(1, range(1, 3))
    assert unbroken.answer(capsys, "diff", str(other.folder))[1][0]["first_difference"] == 1


@pytest.mark.parametrize(
    ("query", "message"),
    [
        (["step", "99"], "step 99 is not in the log, which goes from step 1 to step 4"),
        (["doc"], "doc: give the id of a document"),
        (["verify", "3"], "verify: give no argument"),
        (["export", "table.csv"], "export table.csv: the table is Parquet, so name a file FILE.parquet"),
        (["step", "x"], "must be a whole number"),
        (["step"], "give a step"),
        (["verify", "5"], "give no argument"),
        (["doc", "nobody"], "no document 'nobody'"),
        (["step", "1", "--text"], "give --tokenizer_path"),
        (["diff", "$NOT_SET_HERE/run"], r"names \$NOT_SET_HERE, which is not set"),
        (["export", "~/no/such/folder/t.parquet"], "cannot write /.*/no/such/folder/t.parquet"),
    ],
)
def test_bad_questions_get_one_line(tmp_path: Path, query: list[str], message: str) -> None:
    run = Run(tmp_path / "run", make_store(tmp_path / "store", 30))
    run.attempt(1, [1, 2, 3, 4])
    with pytest.raises(BadInput, match=message):
        main([*query, "--run_dir", str(run.folder)])


def test_queries_do_without_torch() -> None:
    code = "import sys, scripts.datapoints; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_a_question_about_a_long_log_is_answered_at_once(tmp_path: Path) -> None:
    """200,000 steps; the bound is ten times what it takes."""
    run = Run(tmp_path / "run", make_store(tmp_path / "store", 30))
    mark = run.attempt(1, [1])
    line = (run.folder / "datapoints" / "steps.jsonl").read_text()
    with open(run.folder / "datapoints" / "steps.jsonl", "a") as file:
        file.writelines(
            line.replace('"step":1,"slot":0', f'"step":{n},"slot":{(n - 1) * 8}') for n in range(2, 200_001)
        )
    assert mark.step == 1
    replay = Replay(run.folder)
    begin = time.perf_counter()
    assert replay.record.step(123_456).first_slot == 123_455 * 8
    assert replay.record.step_of(123_455 * 8 + 7).step == 123_456
    assert replay.record.consumed() == 200_000 * 8
    assert time.perf_counter() - begin < 0.05
