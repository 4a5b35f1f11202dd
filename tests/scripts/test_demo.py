"""The demo's proofs can fail: each is given a run that differs in the one thing it should detect."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from lit_gpt.checkpoint.checkpoint import write_initial
from lit_gpt.checkpoint.record import checkpoint_name
from lit_gpt.cli import BadInput
from lit_gpt.config import Config
from lit_gpt.datapoints import query
from lit_gpt.datapoints.query import Seen
from lit_gpt.model import GPT
from scripts import demo
from tests.corpus.conftest import built, write_documents

LOSSES = [("1", "8.5", ""), ("2", "8.25", "8.125"), ("3", "8.0", "")]


def write_metrics(run: Path, rows: list[tuple[str, str, str]], tail: str = "") -> Path:
    run.mkdir(exist_ok=True)
    lines = ["step,loss,val_loss", *(",".join(row) for row in rows)]
    (run / "metrics.csv").write_text("\n".join(lines) + "\n" + tail)
    return run


def test_metrics_leave_out_a_line_that_a_kill_cut(tmp_path: Path) -> None:
    run = write_metrics(tmp_path / "run", LOSSES, tail="4,7.")
    assert [row["step"] for row in demo.metrics(run)] == ["1", "2", "3"]
    assert demo.last_step(run) == 3


@pytest.mark.parametrize(
    ("killed", "resumed", "holds"),
    [
        (LOSSES[:2], LOSSES, True),
        ([LOSSES[0], ("2", "8.25", "8.125000001")], LOSSES, False),  # what was trained twice differs
        (LOSSES[:2], [*LOSSES[:2], ("3", "8.000000001", "")], False),
        (LOSSES[:2], LOSSES[:2], False),  # a step is missing
        (LOSSES[:2], [*LOSSES, ("4", "7.5", "")], False),  # one too many
    ],
)
def test_losses(tmp_path: Path, killed: list, resumed: list, holds: bool) -> None:
    before = demo.metrics(write_metrics(tmp_path / "killed", killed))
    run, other = write_metrics(tmp_path / "run", resumed), write_metrics(tmp_path / "other", LOSSES)
    assert demo.same_losses(demo.Interruption(1, 2, before), run, other).holds is holds


@pytest.mark.parametrize(
    ("change", "holds"), [({}, True), ({"digest": "00ff"}, False), ({"slot": 9}, False), ({"attempt": 1}, True)]
)
def test_rows(tmp_path: Path, change: dict, holds: bool) -> None:
    line = {"step": 1, "slot": 0, "rows": 8, "targets": 7, "digest": "00fe", "attempt": 0}
    for name, lines in (("run", [line, {**line, **change}]), ("other", [line])):
        (tmp_path / name / "datapoints").mkdir(parents=True)
        (tmp_path / name / "datapoints/steps.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    assert demo.same_rows(tmp_path / "run", tmp_path / "other").holds is holds


@pytest.mark.parametrize(("value", "holds"), [(0.0, True), (-0.0, False)])
def test_weights_are_compared_by_bits(tmp_path: Path, value: float, holds: bool) -> None:
    config = Config.from_name("debug")
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in GPT(config).state_dict().items()}
    for name, weight in (("run", 0.0), ("other", value)):
        (tmp_path / name).mkdir()
        tensors = [(weight_name, torch.full(shape, weight)) for weight_name, shape in shapes.items()]
        facts = {"step": 3, "slot": 24, "tokens": 100, "settings": {}}
        write_initial(tmp_path / name / checkpoint_name(3), config, tensors, facts)
    assert demo.same_weights(tmp_path / "run", tmp_path / "other").holds is holds


def test_a_program_that_fails_ends_the_demo(tmp_path: Path) -> None:
    shell = demo.Shell(tmp_path, Console(quiet=True))
    assert shell.run("works", "python -c 'print(6 * 7)'") == "42"
    with pytest.raises(SystemExit, match="fails ended with 3, which was not expected"):
        shell.run("fails", "python -c 'raise SystemExit(3)'")


@pytest.mark.parametrize(("terminal", "shown"), [(False, True), (True, False)])
def test_off_a_terminal_the_last_line_of_a_program_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, terminal: bool, shown: bool
) -> None:
    monkeypatch.setattr(demo, "LOG_INTERVAL_S", 0.1)
    screen = io.StringIO()
    shell = demo.Shell(tmp_path, Console(file=screen, force_terminal=terminal, width=200))
    shell.run("works", "sh -c 'echo [step] 7 of 240 >&2; sleep 0.5'")
    assert ("\n  [step] 7 of 240\n" in screen.getvalue()) is shown


def test_a_kill_is_a_kill(tmp_path: Path) -> None:
    shell = demo.Shell(tmp_path, Console(quiet=True))
    shell.run("sleeps", "sleep 60", kill_when=lambda: True)
    with pytest.raises(SystemExit, match="ended with 0"):  # it finished before there was anything to kill
        shell.run("ends", "true", kill_when=lambda: False)


@pytest.mark.parametrize(("seen", "holds"), [(["a"], True), (["a", "b"], True), (["a", "c"], False), ([], False)])
def test_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seen: list[str], holds: bool) -> None:
    """Of three documents c says again what a said, and goes whole."""
    texts = {"a": "ein Satz, der zweimal dasteht", "b": "ein Satz, der nur hier steht"}
    texts["c"] = texts["a"]
    write_documents(tmp_path / "text.jsonl", [{"id": id, "text": text} for id, text in texts.items()])
    built(tmp_path / "text.jsonl", tmp_path / "corpus", min_kept_words=0)
    parts = [Seen(2, 0, 0, 0, 0, id, 0, 1, 0, 0, 0) for id in seen]
    monkeypatch.setattr(query, "Replay", lambda run: SimpleNamespace(step=lambda step: parts if step == 2 else None))
    run = write_metrics(tmp_path / "run", LOSSES[:2])
    assert demo.leads_back(run, tmp_path / "corpus").holds is holds


def test_a_foreign_folder_is_not_emptied(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(BadInput, match="was not made by the demo"):
        demo.empty_folder(tmp_path)
    assert (tmp_path / "thesis.txt").exists()
    demo.empty_folder(tmp_path / "new")
    (tmp_path / "new/old.txt").touch()
    demo.empty_folder(tmp_path / "new")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [demo.MARKER, "logs"]


def test_a_demo_that_was_killed_while_it_emptied_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("made", "marked", "emptied in part"):
        (tmp_path / name).mkdir()
    (tmp_path / "marked" / demo.MARKER).touch()
    demo.empty_folder(tmp_path / "emptied in part")
    (tmp_path / "emptied in part" / "old.txt").touch()
    with monkeypatch.context() as killed:
        killed.setattr(demo, "discard", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            demo.empty_folder(tmp_path / "emptied in part")
    for folder in tmp_path.iterdir():
        demo.empty_folder(folder)
        assert sorted(path.name for path in folder.iterdir()) == [demo.MARKER, "logs"]
