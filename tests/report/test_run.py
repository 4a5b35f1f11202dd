"""What a report knows of a run: its state, the time that is left, where the time went, what happened."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lit_gpt.checkpoint.record import Checkpoint, checkpoint_name
from lit_gpt.cli import BadInput
from lit_gpt.datapoints.attempts import Attempt, Mark
from lit_gpt.datapoints.run_record import StepRecord
from lit_gpt.report import run_view
from lit_gpt.report.blocks import Cell
from lit_gpt.report.goodput import goodput, lost_steps
from lit_gpt.report.life import Beat, life_of, read_beats, time_left
from lit_gpt.report.metrics import Metrics
from lit_gpt.report.run_events import events
from lit_gpt.report.run_page import overview, run_page
from lit_gpt.report.run_view import Deviation, RunView, read_run, read_runs
from scripts import report
from tests.report.test_page import data_of
from tests.support.run_folder import RecordedRun, killed_and_resumed, rolled_back

NOW = 1_800_000_000.0


def beat(rank: int, place: str, ago_s: float) -> Beat:
    return Beat(rank, f"rank {rank}", 7, place, NOW - ago_s)


@pytest.mark.parametrize(
    ("beats", "step", "saved_at", "line_ages", "state"),
    [
        ([], 0, None, [], "empty"),
        ([], 10, 10, [], "finished"),  # of a version whose lines have no time
        ([], 7, 7, [], "stopped"),
        ([], 7, 5, [], "dead"),
        ([beat(0, "update", 10)], 7, 5, [9.0], "running"),
        ([beat(0, "set-up", 10)], 7, 5, [9000.0], "running"),
        ([beat(0, "update", 9000)], 7, 5, [9005.0], "dead"),
        ([beat(0, "agree", 10), beat(1, "update", 9000)], 7, 5, [9.0], "running"),  # the watchdog will end it
        ([beat(0, "finished", 9000)], 10, 10, [9001.0], "finished"),
        ([beat(0, "stopped", 9000), beat(1, "stopped", 9000)], 7, 7, [9001.0], "stopped"),
        ([beat(0, "to be requeued", 9000)], 7, 7, [9001.0], "waiting"),
        ([beat(0, "gave up", 9000)], 7, 7, [9001.0], "gave up"),
        ([beat(0, "failed", 9000)], 7, 5, [9001.0], "failed"),
        ([beat(0, "stopped", 9000)], 8, 7, [10.0], "running"),  # lines after the end: a new start without a watchdog
        ([], 10, 10, [9000.0], "finished"),
        ([], 7, 7, [9000.0], "stopped"),
        ([], 7, 5, [9000.0], "dead"),
        ([], 7, 5, [700.0, 100.0], "running"),
        ([], 7, 5, [2000.0, 1000.0], "running"),  # a line every 1000 s
    ],
)
def test_state(beats: list[Beat], step: int, saved_at: int | None, line_ages: list[float], state: str) -> None:
    times = [NOW - age for age in line_ages]
    assert life_of(beats, step, 10, saved_at, times, 300.0, now=NOW).state == state


def view_of(columns: dict[str, list[float]], times: list[float], attempts: list[Attempt], last: list[int]) -> RunView:
    metrics = Metrics({name: np.array(values, dtype=float) for name, values in columns.items()}, np.array(times), 0)
    life = life_of([], int(columns["step"][-1]), 100, None, times[-1:], None, now=times[-1])
    view = RunView(Path("run"), metrics, life, resolved={"max_steps": 100}, attempts=attempts)
    view.last_steps = [StepRecord(step, 0, 8, 500, 0, number) for number, step in enumerate(last)]
    return view


def start(number: int, at_s: int, parent: int | None = None) -> Attempt:
    mark = None if parent is None else Mark(number - 1, parent, 0, "0" * 16)
    said = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(NOW + at_s))
    return Attempt(number, mark, mark is not None, 0, said, {}, {})


def two_starts() -> RunView:
    """Start 0 at 0 s: 10 s of set-up, steps of 2 s, of which 0.5 s waiting; killed after step 50, at 110 s.

    Start 1 at 200 s goes on from step 40: 20 s of set-up, 20 steps, then a validation of 6 s and a save of 4 s.
    """
    steps = [10.0, 20, 30, 40, 50, 60]
    times = [30.0, 50, 70, 90, 240, 270]
    columns = {
        "step": steps, "attempt": [0.0, 0, 0, 0, 1, 1], "step_s": [2.0] * 6, "data_wait_s": [0.5] * 6,
        "validate_s": [0.0, 0, 0, 0, 0, 6], "save_s": [0.0, 0, 0, 0, 0, 4],
    }  # fmt: skip
    return view_of(columns, [NOW + at for at in times], [start(0, 0), start(1, 200, 40)], [50, 60])


def test_a_copied_heartbeat_is_as_old_as_it_says(tmp_path: Path) -> None:
    path = tmp_path / "rank-00000.json"
    path.write_text('{"rank": 0, "who": "rank 0", "step": 4, "place": "update", "time": 1000.0}')  # by cp -r, just now
    assert read_beats(tmp_path, 1) == [Beat(0, "rank 0", 4, "update", 1000.0)]
    os.utime(path, (1200, 1200))  # written by a node whose clock is 200 s behind
    assert read_beats(tmp_path, 1)[0].time == 1200.0


def test_where_the_time_went() -> None:
    """60 steps of 2 s, 10 steps twice; stopped from the kill at 110 s to 200 s. All of 270 s is accounted for."""
    view = two_starts()
    assert lost_steps(view) == [10, 0]
    assert goodput(view) == {
        "training": 90.0, "waiting for data": 30.0, "validation": 6.0, "saves": 4.0, "steps trained again": 20.0,
        "set-up and compilation": 30.0, "stopped": 90.0,
    }  # fmt: skip


def test_the_time_left_has_an_honest_range() -> None:
    """100 lines of 10 steps, 100 s each at first, 50 s in the last half: 2000 steps to come at 5 s; at most at 10 s.
    Restarted once, 30,000 s after the first start: with such stops the whole run took 3.75 times as long."""
    steps = np.arange(10.0, 1010.0, 10.0)
    intervals = np.where(np.arange(100) < 51, 100.0, 50.0)
    times = NOW + np.cumsum(intervals)
    metrics = Metrics({"step": steps, "attempt": np.ones(100)}, times, 0)
    left = time_left(metrics, 3000, NOW - 30_000)
    assert left is not None
    assert left.likely_s == 10_000
    assert left.low_s == 10_000
    assert left.high_s == 20_000
    assert left.with_stops_s == pytest.approx(2000 * (30_000 + 5100 + 2450) / 1000)
    assert time_left(metrics, None, NOW) is None
    short = time_left(Metrics({"step": steps[:4], "attempt": np.zeros(4)}, times[:4], 0), 3000, NOW)
    assert short is not None
    assert (short.likely_s, short.low_s, short.with_stops_s) == (29_600, None, None)


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return killed_and_resumed(tmp_path_factory.mktemp("resumed") / "run")


@pytest.fixture(scope="module")
def rolled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rolled_back(tmp_path_factory.mktemp("rolled") / "run")


def told(folder: Path) -> list[tuple[int, str, str]]:
    return [(event.step, event.what, event.said) for event in events(read_run(folder))]


def test_what_happened(resumed: Path, rolled: Path) -> None:
    gone = "steps of it are not part of the run any more"
    assert told(resumed) == [(10, "restart", f"after step 10 of start 0; 10 {gone}")]
    assert told(rolled) == [
        (16, "skipped", "the update was skipped: spike, gradient norm 193.5"),
        (10, "rollback", f"after step 10 of start 0; 6 {gone}"),
    ]


def test_the_numbers_are_those_of_the_files(resumed: Path) -> None:
    view = read_run(resumed)
    shown = {name: getattr(value, "value", value) for name, value in overview(view).items()}
    assert shown["state"] == "finished"
    assert shown["step"] == "40 / 40"
    assert (shown["loss"], shown["validation loss"], shown["bits a byte"]) == ("4.0000", "5.2500", "1.5000")
    assert (shown["tokens"], shown["starts"]) == ("20.0 k", 2)
    series = {line["name"]: line for line in data_of(run_page([view]).html())[0]["series"]}
    assert series["training"]["x"]["step"] == list(range(1, 41))
    assert series["training"]["x"]["tokens"] == [500 * step for step in range(1, 41)]
    assert series["training"]["y"] == [9 - step / 8 for step in range(1, 41)]
    assert (series["validation"]["x"]["step"], series["validation"]["y"]) == ([20, 40], [5.25, 5.25])


def test_data_checkpoints_settings_and_samples(resumed: Path) -> None:
    text = run_page([read_run(resumed)]).html()
    assert "<td>/data/wiki</td>" in text
    for part in ("75.00%", "25.00%", "iter-00000040-ckpt.pth", "<b>Am Morgen</b> nach 40 Schritten"):
        assert part in text
    assert "datapoints.py verify" in text
    assert "<td>learning_rate</td><td>0.001</td><td>0.0005</td>" in text
    seen = [row for row in text.split("<tr>") if "/data/w" in row and "%" in row]
    assert len(seen) == 2


def test_checkpoints_of_a_left_branch_damage_and_exports(resumed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(resumed, folder)
    state = next(saved.state_xxh3 for saved in read_run(folder).saved if saved.step == 20)
    card = folder / "huggingface" / "step-00000020" / "README.md"
    card.parent.mkdir(parents=True)
    card.write_text(f"| state of weights and optimizer | xxh3 `{state}` |")
    (folder / "iter-00000040-ckpt.pth" / "state.pth").write_bytes(b"cut")
    saved = {one.step: one for one in read_run(folder).saved}
    assert saved[20].exports == ("step-00000020",)
    assert saved[40].damage.endswith("state.pth is 3 bytes, saved as 3000 bytes")
    assert "3 bytes, saved as 3000 bytes" in run_page([read_run(folder)]).html()


def test_what_cannot_be_read_is_told_and_costs_no_other_part(resumed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(resumed, folder)
    (folder / "settings.yaml").write_text("model_name: [")
    (folder / "resolved.json").write_text("{")
    (folder / "datapoints" / "run.json").write_text("{")
    (folder / "datapoints" / "run-copy.json").write_text("{")
    (folder / "samples.jsonl").write_text("[1]\nnull\n")
    view = read_run(folder)
    assert len(view.problems) == 3
    text = run_page([view]).html()
    assert "What could not be read" in text
    assert data_of(text)[0]["series"][0]["y"][-1] == 4


def test_an_empty_folder_and_one_that_is_none(tmp_path: Path) -> None:
    page = run_page([read_run(tmp_path)]).html()
    assert ">empty<" in page
    assert data_of(page) == []


def test_a_folder_of_runs_keeps_the_page_that_lies_there(tmp_path: Path, resumed: Path) -> None:
    shutil.copytree(resumed, tmp_path / "run")
    page = tmp_path / "report.html"
    report.main([str(tmp_path / "run"), "--output", str(page)])
    before = page.read_bytes()
    with pytest.raises(BadInput, match="is no run folder"):
        report.main([str(tmp_path)])
    assert page.read_bytes() == before


def test_the_overview_names_the_model(resumed: Path) -> None:
    view = read_run(resumed)
    view.settings, view.resolved = {"model_name": "debug"}, {"vocab_size": 4096}
    assert overview(view)["model"] == Cell("debug (1.79 M)")
    view.settings = {}
    assert "model" not in overview(view)


def test_an_empty_folder_can_be_looked_at_again(tmp_path: Path) -> None:
    for _ in range(2):
        report.main([str(tmp_path)])
    (tmp_path / "watchdog").mkdir()
    assert read_run(tmp_path).life.state == "empty"


@pytest.mark.parametrize("content", [None, b"", b"\xff\x00\x12\n", b"no,header\n1,2\n"])
def test_metrics_that_cannot_be_read_are_told(content: bytes | None, resumed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(resumed, folder)
    (folder / "metrics.csv").unlink()
    if content is not None:
        (folder / "metrics.csv").write_bytes(content)
    assert "metrics.csv: no line of it can be read, and the run is at step 40" in read_run(folder).problems


def test_runs_of_the_same_name_are_told_apart(resumed: Path, tmp_path: Path) -> None:
    folders = [tmp_path / "a" / "run", tmp_path / "b" / "run", tmp_path / "b" / "other"]
    for folder in folders:
        shutil.copytree(resumed, folder)
    views = read_runs(folders)
    assert [view.name for view in views] == ["a/run", "b/run", "other"]
    assert "a/run training" in run_page(views).html()


def test_verified_rows_are_told(resumed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(resumed, folder)
    for found, said in (
        ({"steps_to": 40, "contradictions": 0, "time": "t"}, "0 contradictions up to step 40: every row is what"),
        ({"steps_to": 30, "contradictions": 0, "time": "t"}, "; the 10 steps since were not checked"),
        ({"steps_to": 40, "contradictions": 2, "time": "t"}, "2 contradictions up to step 40; python scripts/"),
    ):
        (folder / "datapoints" / "verified.json").write_text(json.dumps(found))
        assert said in run_page([read_run(folder)]).html()


def test_several_runs_beside_each_other(resumed: Path, rolled: Path, tmp_path: Path) -> None:
    output = tmp_path / "both.html"
    shutil.copytree(rolled, tmp_path / "other")
    report.main([str(resumed), str(tmp_path / "other"), "--output", str(output)])
    text = output.read_text(encoding="utf-8")
    assert "<h1>2 runs: run, other</h1>" in text
    assert [line["name"] for line in data_of(text)[0]["series"]] == ["run training", "other training"]
    assert "stopped" in text


def test_a_million_steps_stay_small_and_keep_the_spike(tmp_path: Path) -> None:
    """The page's size, not the reader's speed, so the columns are made here."""
    count = 1_000_000
    steps = np.arange(1.0, count + 1)
    loss = 2.5 + np.random.default_rng(0).normal(0, 0.02, count)
    loss[777_777] = 14.0
    names = ("learning_rate", "grad_norm", "tokens_per_s", "mfu", "mfu_palm", "step_s", "data_wait_s", "memory_gib")
    columns = {"step": steps, "loss": loss, "tokens": steps * 2e6, "val_loss": loss, **dict.fromkeys(names, loss / 3)}
    life = life_of([], count, count, None, [NOW], None, now=NOW)
    text = run_page([RunView(tmp_path, Metrics(columns, NOW + steps, 0), life)]).html()
    assert len(text) < 5e6
    assert max(data_of(text)[0]["series"][0]["y"]) == 14


def test_thousands_of_skipped_updates_stay_small(tmp_path: Path) -> None:
    """All are counted; the restart is marked whatever else is, and the rest evenly."""
    folder = killed_and_resumed(tmp_path / "run")
    view = read_run(folder)
    fields = {"deviation": "skipped", "reason": "spike", "grad_norm": "193.5"}
    view.deviations = [Deviation(0, {**fields, "step": 1 + number % 40}) for number in range(20_000)]
    text = run_page([view]).html()
    assert len(text) < 1e6
    assert "skipped: 20,000, restart: 1" in text
    assert "200 of 20,001 events are marked" in text
    marks = data_of(text)[0]["marks"]
    assert len(marks) == 200
    assert sum(mark["label"].startswith("restart") for mark in marks) == 1


def test_a_checkpoint_that_is_removed_while_it_is_read_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = killed_and_resumed(tmp_path / "run")
    whole = run_view.described

    def described(path: Path) -> Checkpoint:
        if path.name == checkpoint_name(20):
            shutil.rmtree(path)
        return whole(path)

    monkeypatch.setattr(run_view, "described", described)
    view = read_run(folder)
    assert [saved.step for saved in view.saved] == [10, 40]
    assert view.problems == []


def test_bad_input(tmp_path: Path, resumed: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "MANIFEST.json").touch()
    (tmp_path / "model" / "training_record").mkdir(parents=True)
    (tmp_path / "model" / "config.json").touch()
    cases: list[tuple[list[Any], str]] = [
        ([tmp_path / "model"], "model is an exported model; the record of its run is .*/model/training_record"),
        ([tmp_path / "no"], "no such folder"),
        ([tmp_path / "store"], "store is a data set, a corpus or a checkpoint; give the folder of a run"),
        ([tmp_path], "is no run folder; python scripts/runs.py .* lists the runs below it"),
        ([resumed, tmp_path / "run"], "say by --output"),
        ([resumed, resumed, "--output", tmp_path / "report.html"], "is given twice; name each run once"),
        ([resumed, "--output", tmp_path / "no" / "report.html"], "cannot be written"),
    ]
    for argv, said in cases:
        with pytest.raises(BadInput, match=said):
            report.main(list(map(str, argv)))


def test_a_run_that_is_written_to_can_be_read(tmp_path: Path) -> None:
    run = RecordedRun(tmp_path / "run")
    run.start()
    run.step(1, loss=5.0)
    view = read_run(run.folder)
    assert (view.step, view.metrics.last("loss"), view.life.state) == (1, 5.0, "running")
    run.end()
