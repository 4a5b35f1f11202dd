"""Ranks of which one never comes, and what the environment says of ranks: nothing waits in silence."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest

from lit_gpt.cli import BadInput
from lit_gpt.launch.fabric import ClusterEnvironment, LightningEnvironment
from lit_gpt.launch.meeting import NotMet, OneRefused, StoppedBeforeMeeting, meet
from lit_gpt.launch.settings import LaunchSettings
from lit_gpt.launch.site import is_one_of_several
from lit_gpt.launch.world import STRAY, find_world, place_among_ranks
from tests.support.processes import DEAD_PID
from tests.support.programs import environment
from tests.support.training import command


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.distributed
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_never_comes_is_named(store: Path, tmp_path: Path, rank: int) -> None:
    """A lone rank of two, as torchrun would start it. TERM ends it as it ends any run that has nothing to save."""
    port = free_port()
    place = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=2, LOCAL_WORLD_SIZE=2, GROUP_RANK=0)
    process = subprocess.Popen(
        command(store, tmp_path / "run", micro_batch_size=2),
        env=environment(
            TORCHELASTIC_RUN_ID="x", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
            **{name: str(value) for name, value in place.items()},
        ),
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    line = ""
    while "waiting" not in line:
        line = process.stderr.readline()
        assert line, process.wait()
    level = "WARNING" if rank else "INFO"  # by now
    text = rf"{level} waiting for rank {1 - rank} of 2 at 127.0.0.1:{port} \(\d+ s so far, at most 1800\)"
    assert re.search(text, line)
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    _, log = process.communicate(timeout=60)
    assert process.returncode == 0, log
    assert time.monotonic() - began < 30
    if rank == 0:
        assert "stopped by a signal (SIGTERM) before the first step: nothing new to save" in log
    assert "Traceback" not in log


class Place(LightningEnvironment):
    """One of `size` ranks that meet at a port of this machine."""

    def __init__(self, rank: int, size: int, port: int) -> None:
        super().__init__()
        self.set_global_rank(rank)
        self.set_world_size(size)
        self._port = port

    @property
    def main_address(self) -> str:
        return "127.0.0.1"

    @property
    def main_port(self) -> int:
        return self._port


def meet_all(places: list[ClusterEnvironment], **kwargs: object) -> dict[int, object]:
    """What each rank, a thread here, gets of its meeting: an exception, or "met" where it then sees all others."""
    got: dict[int, object] = {}
    stores = []  # with rank 0's, the port would close

    def take_part(place: ClusterEnvironment) -> None:
        rank = place.global_rank()
        try:
            found = meet(place, **{"limit_s": 60.0, **kwargs})  # type: ignore[arg-type]
            stores.append(found)
            found.set(str(rank), "")
            found.wait([str(other) for other in range(place.world_size())])
            got[rank] = "met"
        except NotMet as error:
            got[rank] = error

    threads = [threading.Thread(target=take_part, args=(place,)) for place in places]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return got


def test_ranks_meet_or_leave_together() -> None:
    port = free_port()
    assert meet_all([Place(rank, 3, port) for rank in (2, 0, 1)]) == {0: "met", 1: "met", 2: "met"}
    port = free_port()
    got = meet_all([Place(rank, 3, port) for rank in (2, 0)], limit_s=1.0)
    assert sorted(got) == [0, 2]
    for error in got.values():
        assert isinstance(error, NotMet)
        assert re.search(r"never came to 127.0.0.1:\d+ within 1 s \(--watchdog_long_s\)", str(error))
    port, began = free_port(), time.monotonic()
    got = meet_all([Place(rank, 3, port) for rank in (2, 0)], stopped=lambda: time.monotonic() - began > 1)
    assert [type(error) for error in got.values()] == [StoppedBeforeMeeting] * 2


@pytest.mark.parametrize("rank", [0, 2])
def test_a_rank_that_refuses_its_input_ends_all(rank: int) -> None:
    """Whether it holds the port or not, and though one of the others comes a second later."""
    port = free_port()
    got: dict[int, object] = {}

    def take_part(number: int) -> None:
        try:
            meet(Place(number, 3, port), limit_s=60.0, refused="no such store" if number == rank else None)
        except NotMet as error:
            got[number] = error

    threads = [threading.Thread(target=take_part, args=(number,)) for number in range(3)]
    for thread in threads[1:]:
        thread.start()
        time.sleep(0.5)
    threads[0].start()
    for thread in threads:
        thread.join(60)
    assert {number: (type(error), str(error)) for number, error in got.items()} == dict.fromkeys(
        range(3), (OneRefused, "no such store")
    )
    assert OneRefused.exit_code == 2
    assert NotMet.exit_code == 1


def test_a_started_rank_that_ends_is_named() -> None:
    ended = subprocess.Popen(["sh", "-c", "exit 7"])
    got = meet_all([Place(0, 2, free_port())], children=[ended])
    assert str(got[0]) == f"rank 1 (process {ended.pid}) has ended with exit code 7 before the ranks met"
    stopped = subprocess.Popen(["true"])  # it had a signal and nothing to save
    assert isinstance(meet_all([Place(0, 2, free_port())], children=[stopped])[0], StoppedBeforeMeeting)


SLURM = {"SLURM_JOB_ID": "1"}
STEP = {**SLURM, "SLURM_STEP_ID": "0"}


@pytest.mark.parametrize(
    ("variables", "nodes", "said"),
    [
        ({**STEP, "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "2"}, 1, "this step has 1 .*start it with srun"),
        ({**SLURM, "SLURM_NNODES": "2"}, 1, "job of 2 nodes, but this is no srun step"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, 1, "RANK=1, WORLD_SIZE=2 in the environment, .*env -u RANK -u WORLD_SIZE"),
        ({"LOCAL_RANK": "3"}, 1, "LOCAL_RANK=3 in the environment"),
        ({"WORLD_SIZE": "4"}, 1, "WORLD_SIZE=4 in the environment"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, 1, "OMPI_COMM_WORLD_SIZE=2 in the environment"),
        ({"PMI_RANK": "1"}, 1, "PMI_RANK=1 in the environment"),
        ({"TORCHELASTIC_RUN_ID": "x"}, 1, "torchrun's WORLD_SIZE is not: unset it"),
        ({**STEP, "SLURM_NTASKS": "two"}, 1, "SLURM_NTASKS=two in the environment is not a number"),
        ({"LIT_GPT_PARENT": str(DEAD_PID), "LOCAL_RANK": "1"}, 1, "the program that started this rank has ended"),
        ({}, 2, "--num_nodes 2, but nothing starts the processes of the other nodes: .*srun --nodes=2"),
    ],
)
def test_ranks_that_nobody_starts_are_refused(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], nodes: int, said: str
) -> None:
    no_launcher(monkeypatch, variables)
    with pytest.raises(BadInput, match=said):
        find_world(LaunchSettings(accelerator="cpu", num_nodes=nodes))


@pytest.mark.parametrize(
    "variables",
    [
        {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "PMIX_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"},
        {**STEP, "SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_NNODES": "1", "PMI_SIZE": "1"},
    ],
)
def test_one_process_of_a_launcher_starts_the_ranks_itself(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]
) -> None:
    """Also in Slurm's step of one task (srun --pty bash), where there may be several GPUs."""
    no_launcher(monkeypatch, variables)
    world = find_world(LaunchSettings(accelerator="cpu", devices=2))
    assert world.size == 2
    assert not world.environment.creates_processes_externally


TORCHRUN = dict(TORCHELASTIC_RUN_ID="x", MASTER_ADDR="127.0.0.1", MASTER_PORT="1")


@pytest.mark.parametrize(
    ("variables", "rank"),
    [
        ({"LIT_GPT_PARENT": str(os.getppid()), "LOCAL_RANK": "1", "WORLD_SIZE": "2"}, 1),
        ({"LIT_GPT_PARENT": str(os.getpid()), "LOCAL_RANK": "0", "WORLD_SIZE": "2"}, None),
        ({**TORCHRUN, "RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}, 1),
        ({**TORCHRUN, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}, None),
        ({**STEP, "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "1"}, 1),
        ({**STEP, "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, None),
        ({"RANK": "1", "WORLD_SIZE": "2"}, None),  # nobody's
        ({}, None),
    ],
)
def test_who_is_one_of_several(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], rank: int | None) -> None:
    """A rank of torchrun or of srun, or one that rank 0 has started; not rank 0 itself, and not a lone process."""
    no_launcher(monkeypatch, {"SLURM_JOB_NAME": "train", **variables})
    place = place_among_ranks()
    assert (place.global_rank() if place else None) == rank
    assert place is None or (place.world_size() == 2 and is_one_of_several())


def no_launcher(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    clean = {name: value for name, value in environment().items() if name not in STRAY}
    monkeypatch.setattr("os.environ", {**clean, **variables})
