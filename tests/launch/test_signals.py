"""Signals: answered at once, obeyed within a validation and samples; a second Ctrl-C; a lost terminal; nohup."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lit_gpt.data.token_store import write_store
from lit_gpt.data.tokenizer import Tokenizer
from tests.support.programs import ROOT, StartedProgram, environment, run_program, start_program
from tests.support.small_tokenizer import write_byte_level
from tests.support.training import command, metrics

SLOW_PAUSES = ROOT / "tests/support/slow_pauses.py"
ALONE = dict(program=SLOW_PAUSES, micro_batch_size=1, eval_interval_steps=2, save_interval_steps=100, max_steps=40)
"""A validation of at least 12 batches after every second step; it is the first thing to save."""


def start_pausing(
    flags: list[str], log: Path, *, slow_s: float, until: str = "validates", fresh: bool = False
) -> StartedProgram | subprocess.Popen[bytes]:
    """Start the program; returns it in its first validation or sample. Standard error goes to the log.

    fresh: as a child of this process, for one that starts ranks.
    """
    variables = {"SLOW_S": str(slow_s)}
    with log.open("w") as file:
        process = (
            subprocess.Popen(flags, env=environment(**variables), stderr=file)
            if fresh
            else start_program(flags, stderr=file, **variables)
        )
    deadline = time.monotonic() + 240
    while until not in log.read_text():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_within_a_validation_saves_at_once(store: Path, tmp_path: Path, number: signal.Signals) -> None:
    """Each batch takes 1 s; the signal comes within the first one. No step is done after it."""
    process = start_pausing(command(store, tmp_path / "run", **ALONE), tmp_path / "log", slow_s=1)
    process.send_signal(number)
    assert process.wait(timeout=240) == 0
    log = (tmp_path / "log").read_text()
    assert 1 <= log.count("validates a batch") <= 2
    assert re.search(rf"{number.name}: saving after this step", log)
    assert "step 2: left out, to save at once: validate" in log
    assert f"stopped by a signal ({number.name}) after step 2, saved" in log
    assert [path.name for path in (tmp_path / "run").glob("iter-*")] == ["iter-00000002-ckpt.pth"]
    assert [row["step"] for row in metrics(tmp_path / "run")] == ["1", "2"]
    assert "val_loss" not in metrics(tmp_path / "run")[-1] or not metrics(tmp_path / "run")[-1]["val_loss"]


@pytest.mark.slow
def test_a_signal_within_a_sample_saves_at_once(tmp_path: Path) -> None:
    """Each of 60 tokens takes 1 s; the signal comes within the first one."""
    tokenizer = write_byte_level(tmp_path / "tokenizer", [])
    write_store(
        tmp_path / "train", [(str(number), [*range(3, 250), 1]) for number in range(40)], shard_tokens=10_000,
        tokenizer_fingerprint=Tokenizer.from_folder(tokenizer).fingerprint, vocab_size=300, bos_id=None, eos_id=1,
    )  # fmt: skip
    settings = dict(
        program=SLOW_PAUSES, tokenizer_path=tokenizer, sample_interval_steps=2, sample_tokens=60,
        sample_prompts='["a"]', save_interval_steps=100, val_data_dir=None,
    )  # fmt: skip
    flags = command(tmp_path, tmp_path / "run", **settings)
    process = start_pausing(flags, tmp_path / "log", slow_s=1, until="draws a token")
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=240) == 0
    log = (tmp_path / "log").read_text()
    assert 1 <= log.count("draws a token") <= 2
    assert "step 2: left out, to save at once: sample" in log
    assert "stopped by a signal (SIGTERM) after step 2, saved" in log
    assert [path.name for path in (tmp_path / "run").glob("iter-*")] == ["iter-00000002-ckpt.pth"]
    assert not (tmp_path / "run/samples.jsonl").exists(), "no text that was cut short"


@pytest.mark.slow
def test_the_time_limit_within_a_validation_saves_in_time(store: Path, tmp_path: Path) -> None:
    """The validation would take longer than the whole job; a slow machine gets a longer one."""
    for limit_s in (10, 40, 160):
        out = tmp_path / str(limit_s)
        done = run_program(
            command(store, out, **ALONE, time_limit_s=limit_s, stop_margin_s=limit_s * 0.3),
            env=environment(SLOW_S=str(limit_s / 10)),
        )
        if "left out" in done.stderr:
            break
    assert done.returncode == 0, done.stderr
    assert "step 2: left out, to save at once: validate" in done.stderr
    assert done.stderr.count("validates a batch") < 8
    found = re.search(r"stopped (\d+) s before the job's time limit after step 2, saved", done.stderr)
    assert found, done.stderr
    assert int(found[1]) >= 1
    assert [path.name for path in out.glob("iter-*")] == ["iter-00000002-ckpt.pth"]


@pytest.mark.distributed
def test_a_second_ctrl_c_ends_at_once(store: Path, tmp_path: Path) -> None:
    """Two ranks in a batch that takes 10 minutes; the interrupts go to the first alone, which takes the other along."""
    flags = command(store, tmp_path / "run", **ALONE, devices=2)
    process = start_pausing(flags, tmp_path / "log", slow_s=600, fresh=True)
    (child,) = (
        int(pid)
        for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        if b"slow_pauses.py" in Path(f"/proc/{pid}/cmdline").read_bytes()
    )
    process.send_signal(signal.SIGINT)
    deadline = time.monotonic() + 60
    while "SIGINT: saving after this step" not in (tmp_path / "log").read_text():
        assert time.monotonic() < deadline, "a first Ctrl-C is answered"
        time.sleep(0.02)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    log = (tmp_path / "log").read_text()
    assert "; again: abort without saving" in log
    assert "SIGINT again: aborted without saving" in log
    assert "Traceback" not in log
    assert not list((tmp_path / "run").glob("iter-*"))
    while Path(f"/proc/{child}").exists() and Path(f"/proc/{child}/stat").read_text().split()[2] != "Z":
        assert time.monotonic() < deadline, "the other rank ended, too"
        time.sleep(0.02)


WAIT = """
import logging, os, signal, sys, time
from pathlib import Path
from lit_gpt.launch.signals import StopFlag
logging.basicConfig(level=logging.INFO, stream=sys.stderr)
flag = StopFlag()
Path(sys.argv[1] + ".ready").touch()
end = time.monotonic() + float(sys.argv[2])
while not flag.received and time.monotonic() < end:
    time.sleep(0.01)
time.sleep(0.1)
print("written to the terminal", file=sys.stderr, flush=True)
Path(sys.argv[1]).write_text(str(flag.received))
"""


def test_a_lost_terminal_does_not_end_the_save(tmp_path: Path) -> None:
    """The other end of a pseudo-terminal is closed: SIGHUP, and each write to it fails."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(sys.executable, [sys.executable, "-c", WAIT, str(tmp_path / "got"), "60"], environment())
    deadline = time.monotonic() + 60
    while not (tmp_path / "got.ready").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.close(terminal)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert (tmp_path / "got").read_text() == "SIGHUP"


def test_nohup_is_honoured(tmp_path: Path) -> None:
    process = subprocess.Popen(
        ["nohup", sys.executable, "-c", WAIT, str(tmp_path / "got"), "0.5"],
        env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    while not (tmp_path / "got.ready").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=60) == 0
    assert (tmp_path / "got").read_text() == "None"
