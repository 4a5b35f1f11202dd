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
    port = free_port()
    processes = [
        subprocess.Popen(
            command(store, tmp_path / "run", **{"devices": 2, "max_steps": 2, "warmup_steps": 1, **flags}),
            env=torchrun(rank, port), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        )
        for rank, flags in enumerate(({}, changed))
    ]  # fmt: skip
    texts = [process.communicate(timeout=90)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2], texts
    (line,) = [line for text in texts for line in text.splitlines() if "error: " in line]
    assert "rank 1 on" in line
    assert said in line
    assert not list((tmp_path / "run").glob("iter-*"))


def test_the_line() -> None:
    ranks = [("a", {"seed": "1"}), ("a", {"seed": "1"}), ("b", {"seed": "2"}), ("b", {"seed": "3"})]
    assert difference(ranks) == (
        "rank 2 on b differs from rank 0 on a (and 1 more ranks differ): seed is 2 there and 1 on rank 0. Make them "
        "equal"
    )
