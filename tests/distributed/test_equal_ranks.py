"""Ranks that differ end before the first step, with one line that names the rank and what differs."""

from __future__ import annotations

import socket
import subprocess
from pathlib import Path

import pytest

from lit_gpt.data.token_store import write_store
from lit_gpt.train.equal_ranks import difference
from tests.support.programs import environment
from tests.support.training import EOS, VOCABULARY, command, documents

pytestmark = pytest.mark.distributed


def torchrun(rank: int, port: int) -> dict[str, str]:
    """What torchrun would tell rank `rank` of two on this machine."""
    ranks = dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", GROUP_RANK="0")
    return environment(TORCHELASTIC_RUN_ID="x", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), **ranks)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def start_two(store: Path, run: Path, *flags: dict[str, object]) -> list[tuple[int, str]]:
    """Exit code and stderr of each rank; flags: of rank 0 and of rank 1."""
    port = free_port()
    processes = [
        subprocess.Popen(
            command(store, run, **{"devices": 2, "max_steps": 2, "warmup_steps": 1, **own}),
            env=torchrun(rank, port), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        )
        for rank, own in enumerate(flags)
    ]  # fmt: skip
    texts = [process.communicate(timeout=240)[1] for process in processes]
    assert not list(run.glob("iter-*"))
    return [(process.returncode, text) for process, text in zip(processes, texts, strict=True)]


@pytest.mark.parametrize("what", ["learning rate", pytest.param("store", marks=pytest.mark.long)])
def test_two_processes_of_which_one_differs(store: Path, tmp_path: Path, what: str) -> None:
    other = write_store(
        tmp_path / "other", documents(80, 9), tokenizer_fingerprint="test", vocab_size=VOCABULARY, bos_id=1,
        eos_id=EOS, shard_tokens=6000,
    ).path  # fmt: skip
    changed: dict[str, object]
    changed, said = {
        "learning rate": ({"learning_rate": 1e-3}, "learning_rate is 0.001 there and 0.003 on rank 0"),
        "store": ({"train_data_dir": other}, "datasets is"),
    }[what]  # type: ignore[assignment]
    ended = start_two(store, tmp_path / "run", {}, changed)
    assert [code for code, _ in ended] == [2, 2], ended
    (line,) = [line for _, text in ended for line in text.splitlines() if "error: " in line]
    assert "rank 1 on" in line
    assert said in line


@pytest.mark.parametrize(
    ("rank", "flags", "reason"),
    [
        (1, {"train_data_dir": "/nowhere"}, "no data set in /nowhere: there is no such folder"),
        (1, {"attention": "fa3"}, "--attention fa3 cannot run here: "),
        pytest.param(0, {"attention": "fa3"}, "--attention fa3 cannot run here: ", marks=pytest.mark.long),
        pytest.param(0, {"train_data": "x"}, "no flag --train_data; did you mean", marks=pytest.mark.long),
        pytest.param(1, {"seed": "x"}, "--seed", marks=pytest.mark.long),
    ],
)
def test_one_rank_that_does_not_start_ends_both(
    store: Path, tmp_path: Path, rank: int, flags: dict[str, object], reason: str
) -> None:
    """Before the ranks have met (its data are missing, a flag is wrong) and after it (a kernel is missing)."""
    ended = start_two(store, tmp_path / "run", *(flags if number == rank else {} for number in range(2)))
    assert [code for code, _ in ended] == [2, 2], ended
    (own,) = [line for line in ended[rank][1].splitlines() if "error: " in line]
    (heard,) = [line for line in ended[1 - rank][1].splitlines() if "ERROR " in line]
    assert f"error: {reason}" in own
    assert f"all ranks end, since rank {rank} on {socket.gethostname()} cannot go on: {reason}" in heard
    assert not [line for _, text in ended for line in text.splitlines() if "Traceback" in line or "frame #" in line]


def test_the_line() -> None:
    ranks = [("a", {"seed": "1"}), ("a", {"seed": "1"}), ("b", {"seed": "2"}), ("b", {"seed": "3"})]
    assert difference(ranks) == (
        "rank 2 on b differs from rank 0 on a (and 1 more ranks differ): seed is 2 there and 1 on rank 0. Make them "
        "equal"
    )
