"""What a training shows: the same facts on a narrow terminal, on a wide one and in a log file."""

from __future__ import annotations

import io
import logging
import re

import pytest
from rich.console import Console

from lit_gpt.train.progress import Clock, ProgressBar, described, duration, packed, short, terminal_bar

ROW = dict(
    step=120, learning_rate=3e-3, loss=3.45678, grad_norm=0.98765, tokens=1_234_567, tokens_per_s=12345.6, mfu=0.4512,
    val_loss=3.5, val_bits_per_byte=1.23456, skipped_steps=0, epoch=1, targets=7000,
)  # fmt: skip
SHOWN = [
    "epoch 1.25", "1.23 M tokens", "lr 3.00e-03", "loss 3.4568", "grad norm 0.988", "12,346 tokens/s", "MFU 45.1%",
    "val loss 3.5000, 1.2346 bits/byte",
]  # fmt: skip


class Time:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_time_left_leaves_out_the_first_step() -> None:
    time = Time()
    clock = Clock(10, time)
    assert str(clock) == "? left, 0:00:00 elapsed"
    time.now += 60  # the first step compiles
    clock.advance(1)
    assert str(clock) == "? left, 0:01:00 elapsed"
    time.now += 8
    clock.advance(3)
    assert str(clock) == "0:00:28 left, 0:01:08 elapsed"  # 4 s a step, 7 steps
    clock.advance(10)
    assert str(clock) == "0:00:00 left, 0:01:08 elapsed"


def test_time_left_of_a_resumed_run_counts_its_own_steps() -> None:
    time = Time()
    clock = Clock(1000, time)
    clock.advance(501)
    time.now += 10
    clock.advance(506)
    assert str(clock) == "0:16:28 left, 0:00:10 elapsed"  # 2 s a step, 494 steps
    clock.advance(400)  # a rollback
    assert str(clock) == "? left, 0:00:10 elapsed"


def test_words() -> None:
    assert [duration(s) for s in (0, 65.9, 3600, 86399, 86400, 1_000_000)] == [
        "0:00:00", "0:01:05", "1:00:00", "23:59:59", "1d 00:00", "11d 13:46",
    ]  # fmt: skip
    assert [short(n) for n in (0, 999, 1000, 12_345, 999_600, 1_234_567, 3e12, 2e15)] == [
        "0", "999", "1.00 k", "12.3 k", "1.00 M", "1.23 M", "3.00 T", "2000 T",
    ]  # fmt: skip
    assert packed(["aaa", "bb", "c"], 8) == ["aaa | bb", "c"]
    assert packed(["longer than that", "c"], 5) == ["longer than that", "c"]
    assert list(described(ROW, 1.25).values()) == SHOWN
    assert "val" not in described({**ROW, "val_loss": None, "mfu": None}, 1.25)


@pytest.mark.parametrize("width", [80, 200])
def test_a_terminal_shows_everything_at_any_width(width: int) -> None:
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    time = Time()
    clock = Clock(1_430_512, time)
    clock.advance(1)
    time.now += 36_000
    clock.advance(10_001)
    bar = terminal_bar(clock, described(ROW, 1.25), console)
    bar.add_task("train", total=1_430_512, completed=700_000)
    with console.capture() as captured:
        console.print(bar.get_renderable())
    lines = captured.get().splitlines()
    text = re.sub(r"\s+", " ", " ".join(lines))
    for word in ["step 700000/1430512", "59d 04:30 left, 10:00:00 elapsed", *SHOWN]:
        assert word in text, lines
    assert "━━━━" in lines[0]
    assert all(len(line.rstrip()) <= width for line in lines), lines
    assert len(lines) == {80: 3, 200: 2}[width]


def test_a_log_file_has_the_same_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), ProgressBar(400, 0, enabled=True) as progress:  # stderr is no terminal here
        progress.show(ROW, 1.25)
    (line,) = caplog.messages
    assert re.fullmatch(r"step 120/400 \| \? left, 0:00:00 elapsed \| " + re.escape(" | ".join(SHOWN)), line)


def test_other_ranks_show_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), ProgressBar(400, 0, enabled=False) as progress:
        progress.show(ROW, 1.25)
        progress.advance(120)
    assert caplog.messages == []
