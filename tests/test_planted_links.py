"""A link that somebody planted under a name that a program writes to: what it leads to stays as it was."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from lit_gpt.corpus.fates import SPOT_BITS
from lit_gpt.corpus.paragraph_fates import _Rounds
from lit_gpt.corpus.parts import Layout
from lit_gpt.corpus.settings import DedupSettings
from lit_gpt.datapoints.line_log import LineLog
from lit_gpt.export import model_card
from lit_gpt.files import open_own, publish, rewrite, save_figure, write_json
from lit_gpt.launch import watchdog as watching
from lit_gpt.launch.settings import WatchdogSettings
from lit_gpt.launch.watchdog import Watchdog
from lit_gpt.prepare.build_request import WORK
from lit_gpt.train.profiler import StepProfiler
from lit_gpt.train.sampling import Sample
from lit_gpt.train.sent_steps import SentSteps
from lit_gpt.train.settings import TrackerSettings
from lit_gpt.train.trackers import Trackers

PRECIOUS = b"thesis\n00000000000000000000\nprecious\n"


def lines(folder: Path) -> None:
    log = LineLog(folder / "steps.jsonl")
    log.append("{}\n")
    log.close()


def trackers(folder: Path) -> None:
    found = Trackers(folder, 0, TrackerSettings(tensorboard=False, wandb="off"), {})
    found.log({"step": 1, "loss": 2.0})
    found.log_samples(1, [Sample("Es war", " einmal", 2, False)])
    found.close()


def sent_steps(folder: Path) -> None:
    SentSteps(folder / "wandb-id", "thesis", 0, "0" * 16, "project").note(7)


def watchdog(folder: Path) -> Watchdog:
    return Watchdog(folder, "rank 0 on here", 0, 1, WatchdogSettings(watchdog_factor=0))


def stall(folder: Path) -> None:
    with pytest.raises(SystemExit):
        watchdog(folder)._end_stalled(1.0, 1.0, 1.0)


def profiler(folder: Path) -> None:
    found = StepProfiler("1:2", folder.parent, torch.device("cpu"))
    found.before_step(1)
    found.stop()


def plot(folder: Path) -> None:
    save_figure(Figure(), folder / "losses.svg", dpi=20)


def repeats(folder: Path) -> None:
    """Two documents of one equal paragraph."""
    layout = Layout(folder.parent.parent)
    for kind, array in {
        "keys.npy": np.zeros((3, 2), np.uint64), "starts.npy": np.array([0, 1, 2]), "bounds.npy": np.array([0, 2]),
        "members.npy": np.array([[0, 0], [0, 1 << SPOT_BITS]], np.uint64),
    }.items():  # fmt: skip
        np.save(folder / f"00000.{kind}", array)
    _Rounds(layout, 1, DedupSettings(), None)._write_repeats(0)


WRITERS: dict[str, tuple[tuple[str, ...], Callable[[Path], object]]] = {
    "a log": (("steps.jsonl",), lines),
    "trackers": (("metrics.csv", "samples.jsonl"), trackers),
    "sent steps": (("wandb-id",), sent_steps),
    "heartbeat": (("rank-00000.json", "rank-00000.new"), lambda folder: watchdog(folder)._beat(warn=True)),
    "stacks": (("stacks-rank-00000.txt",), stall),
    "a stall": (("stalled-rank-00000.txt",), lambda folder: watchdog(folder)._is_worth_a_requeue()),
    "a profile": (("steps-1-2.trace.json.gz", "steps-1-2.kernels.txt", "steps-1-2.memory.pickle"), profiler),
    "repeats": (("00000.repeats.npy",), repeats),
    "a plot": (("losses.svg",), plot),
    "loss curve": (("loss.png",), lambda folder: model_card._draw([{"step": "1", "loss": "9"}], folder / "loss.png")),
    "settings": (("settings.yaml",), lambda folder: write_json(folder / "settings.yaml", {})),
    "a file": (("environment.json",), lambda folder: publish(folder / "environment.json", [b"ours"])),
}


@pytest.mark.parametrize("dangling", [False, True], ids=["link to a file", "dangling link"])
@pytest.mark.parametrize("writer", WRITERS)
def test_nothing_is_written_through_a_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: str, dangling: bool
) -> None:
    monkeypatch.setattr(watching.os, "_exit", lambda code: (_ for _ in ()).throw(SystemExit(code)))
    names, write = WRITERS[writer]
    folder = tmp_path / {"a profile": "profile", "repeats": f"{WORK}/dedup"}.get(writer, "run")
    folder.mkdir(parents=True)
    targets = [tmp_path / f"victim-{name}" for name in names]
    for name, target in zip(names, targets, strict=True):
        (folder / name).symlink_to(target)
        if not dangling:
            target.write_bytes(PRECIOUS)
    with suppress(OSError):  # refused, said in the log, or the link is replaced
        write(folder)
    for target in targets:
        assert target.read_bytes() == PRECIOUS if not dangling else not target.exists(), target


def test_files_of_ours_are_written_in_place(tmp_path: Path) -> None:
    path = tmp_path / "beat"
    rewrite(path, b"a long line\n")
    rewrite(path, b"short\n")
    assert path.read_bytes() == b"short\n"
    os.mkfifo(tmp_path / "pipe")
    for name, said in (("pipe", "No such device or address"), (".", "Is a directory")):
        with pytest.raises(OSError, match=said):
            rewrite(tmp_path / name, b"x")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    with pytest.raises(OSError, match="it is no regular file"):
        open_own(tmp_path / "pipe", os.O_WRONLY)
    os.close(reader)
