"""The line of each rank to rank 0: who ended, and why, is told within seconds, and all end."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.programs import environment

RANK = """
import logging, os, signal, socket, sys, time
from pathlib import Path
from lit_gpt.launch.lifeline import Line

rank, size, folder, faults = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), eval(sys.argv[4])
logging.basicConfig(format="%(message)s", stream=sys.stdout)

def share(text):
    if rank == 0:
        (folder / "new").write_text(text)
        (folder / "new").rename(folder / "port")
    while not (folder / "port").exists():
        time.sleep(0.02)
    return (folder / "port").read_text()

line = Line(
    rank, size, f"rank {rank} on here", share=share, address="127.0.0.1", silent_s=8, first_of_node=rank == 0,
    folder=folder / "watchdog", dump=lambda folder, rank: None,
)
if rank == 0:  # a scan of the ports, which ends nothing
    port = int((folder / "port").read_text().split()[0])
    for words in (b"GET / HTTP/1.1\\r\\n\\r\\n", b'{"rank": 1, "fails": "no", "code": 1}\\n', b""):
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.sendall(words)
line.where = lambda: (6, "save")
open(folder / f"up-{rank}", "w")
while len(list(folder.glob("up-*"))) < size:
    time.sleep(0.02)
time.sleep(2.5)  # a beat with the place
fault = faults.get(rank)
if fault == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
elif fault == "stop":
    os.kill(os.getpid(), signal.SIGSTOP)
elif fault == "lost a peer":
    time.sleep(0.5)
    line.end_with_lost_rank()
    os._exit(99)
elif fault == "leaves":
    time.sleep(rank)
    line.leave()
    os._exit(0)
time.sleep(100)  # in a collective that does not end
"""


CASES: list[tuple[dict[int, str], list[int], str | None]] = [
    ({1: "kill"}, [1, -9, 1], "rank 1 on here (process {}) ended without a word"),
    ({1: "kill", 2: "lost a peer"}, [1, -9, 1], "rank 1 on here (process {}) ended without a word"),
    ({2: "stop"}, [1, 1, -9], "rank 2 on here (process {}) was silent for "),
    ({0: "kill", 1: "lost a peer"}, [-9, 1, 1], "rank 0 on here (process {}) ended without a word"),
    ({0: "stop"}, [-9, 1, 1], "rank 0 on here (process {}) was silent for "),
    ({0: "leaves", 1: "leaves", 2: "leaves"}, [0, 0, 0], None),
]
"""Faults of three ranks; the exit code of each, -9 where it is killed; the line that is told."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, list[int | None], list[str]]]:
    """All cases at once, as they mostly wait: folder, exit codes (None: still there after 90 s) and output of each."""
    folders = [tmp_path_factory.mktemp("case") for _ in CASES]
    started = [
        [
            subprocess.Popen(
                [sys.executable, "-c", RANK, str(rank), "3", str(folder), repr(faults)],
                env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )
            for rank in range(3)
        ]
        for folder, (faults, *_) in zip(folders, CASES, strict=True)
    ]  # fmt: skip
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and any(rank.poll() is None for ranks in started for rank in ranks):
        time.sleep(0.1)
    codes = [[rank.poll() for rank in ranks] for ranks in started]
    for ranks in started:
        for rank in ranks:
            rank.kill()
    said = [[rank.communicate()[0] for rank in ranks] for ranks in started]
    return list(zip(folders, codes, said, strict=True))


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("case", range(len(CASES)), ids=[str(faults) for faults, *_ in CASES])
def test_all_end_and_one_line_says_why(runs: list[tuple[Path, list[int | None], list[str]]], case: int) -> None:
    faults, codes, told = CASES[case]
    folder, found, said = runs[case]
    log = "".join(said)
    assert found == codes, log
    lines = [line for line in log.splitlines() if "all ranks end" in line]
    assert len(lines) == (told is not None), log
    if told is not None:
        assert all(part in lines[0] for part in told.split("{}")), log
        assert lines[0].endswith(", in step 7, last heard of at 'save': all ranks end")
        assert "Traceback" not in log
    hung = [rank for rank in range(3) if rank not in faults]
    stacks = sorted(path.name for path in (folder / "watchdog").glob("stacks-*"))
    assert stacks == [f"stacks-rank-{rank:05d}.txt" for rank in hung]
