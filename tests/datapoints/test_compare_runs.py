"""Comparing the losses of two real runs on the same rows, one in bf16: numbers, refusals, picture."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest

from lit_gpt.cli import BadInput
from scripts.compare_runs import main
from tests.support.training import train

STEPS = 6


@pytest.fixture(scope="module")
def runs(store: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The reference in fp32, and bf16-true on the same rows in other micro-batches."""
    folder = tmp_path_factory.mktemp("runs")
    settings = dict(max_steps=STEPS, eval_interval_steps=3, save_interval_steps=100)
    train(store, folder / "fp32", **settings)
    train(store, folder / "bf16", precision="bf16-true", micro_batch_size=8, log_interval_steps=2, **settings)
    return [folder / "fp32", folder / "bf16"]


def losses(run: Path) -> dict[int, float]:
    with (run / "metrics.csv").open(newline="") as file:
        return {int(row["step"]): float(row["loss"]) for row in csv.DictReader(file)}


def compare(capsys: pytest.CaptureFixture[str], *arguments: Path | str) -> list[dict[str, object]]:
    main([str(argument) for argument in arguments])
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def changed_copy(run: Path, folder: Path) -> Path:
    """A changed copy of a run folder, without checkpoints."""
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("*-ckpt.pth"))
    return folder


@pytest.mark.slow
def test_differences_at_equal_steps(runs: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    first, second = compare(capsys, *runs)
    one, other = (losses(run) for run in runs)
    apart = {step: other[step] - one[step] for step in (2, 3, 4, 6)}  # a validation at 3 logs too
    assert second["changed"] == {"precision": "bf16-true", "micro_batch_size": 8, "log_interval_steps": 2}
    assert second["compared_steps"] == 4
    assert second["largest_difference"] == apart[second["at_step"]]
    assert abs(second["largest_difference"]) == max(map(abs, apart.values()))
    assert 0 < abs(second["largest_difference"]) < 0.1  # bf16 is not fp32, and the rows are the same
    assert second["mean_difference"] == pytest.approx(sum(map(abs, apart.values())) / 4)
    assert second["bias"] == pytest.approx(sum(apart.values()) / 4)
    assert second["val_difference"] == second["val_loss"] - first["val_loss"]
    assert second["val_at_step"] == STEPS
    assert (first["steps"], first["loss"], first["changed"]) == (STEPS, one[STEPS], {})
    assert "largest_difference" not in first
    assert first["tokens_per_s"] > 0


def test_a_run_that_goes_on_is_compared_as_far_as_it_is(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Step 4 is the last whole one in the log, and its line in metrics.csv is cut short."""
    short = changed_copy(runs[0], tmp_path / "short")
    steps = short / "datapoints" / "steps.jsonl"
    lines = steps.read_text().splitlines(keepends=True)
    steps.write_text("".join(lines[:4]) + lines[4][:20])
    text = (short / "metrics.csv").read_text()
    (short / "metrics.csv").write_text(text[: text.index("\n4,") + 8])
    _, found = compare(capsys, runs[0], short)
    assert (found["steps"], found["compared_steps"], found["largest_difference"]) == (3, 3, 0)
    assert (found["val_at_step"], found["val_difference"]) == (3, 0)  # not the reference's newest


def test_other_rows_are_refused(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One digit of step 4's digest is changed."""
    other = changed_copy(runs[1], tmp_path / "other")
    steps = other / "datapoints" / "steps.jsonl"
    lines = steps.read_text().splitlines(keepends=True)
    record = json.loads(lines[3])
    digit = record["digest"][-1]
    lines[3] = lines[3].replace(record["digest"], record["digest"][:-1] + ("0" if digit != "0" else "1"))
    steps.write_text("".join(lines))
    with pytest.raises(BadInput, match=r"saw other rows than .*fp32 from step 4 on"):
        main([str(runs[0]), str(runs[1]), str(other)])
    assert capsys.readouterr().out == ""


def test_a_loss_that_is_not_a_number_is_the_largest_difference(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = changed_copy(runs[0], tmp_path / "broken")
    text = (broken / "metrics.csv").read_text()
    (broken / "metrics.csv").write_text(text.replace(str(losses(broken)[5]), "nan"))
    _, found = compare(capsys, runs[0], broken)
    assert found["at_step"] == 5
    assert found["largest_difference"] != found["largest_difference"]


def test_bad_input(runs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"holds no settings.yaml: give the folder of a run"):
        main([str(runs[0]), str(tmp_path)])
    silent = changed_copy(runs[0], tmp_path / "silent")
    (silent / "metrics.csv").unlink()
    with pytest.raises(BadInput, match=r"holds no line in metrics.csv"):
        main([str(runs[0]), str(silent)])
    with pytest.raises(BadInput, match=r"losses.txt: unknown ending. Valid: .png, .svg, .pdf"):
        main([str(runs[0]), "--plot", "losses.txt"])
    with pytest.raises(BadInput, match="cannot be written: No such file or directory"):
        main([*map(str, runs), "--plot", str(tmp_path / "nowhere" / "losses.png")])


def test_no_step_in_common_is_refused(runs: list[Path], tmp_path: Path) -> None:
    odd = changed_copy(runs[0], tmp_path / "odd")
    lines = (odd / "metrics.csv").read_text().splitlines(keepends=True)
    (odd / "metrics.csv").write_text("".join(line for line in lines if line.split(",")[0] not in ("2", "3", "4", "6")))
    with pytest.raises(BadInput, match="logged no step in common"):
        main([str(runs[1]), str(odd)])


def test_plot(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compare(capsys, *runs, "--plot", tmp_path / "losses.png")
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")
    compare(capsys, *runs, "--plot", tmp_path / "losses.svg")
    assert "step" in (tmp_path / "losses.svg").read_text()
    (tmp_path / "link.png").symlink_to(tmp_path / "losses.svg")
    with pytest.raises(BadInput, match=r"--plot .*/link.png cannot be written: it is a symbolic link"):
        main([*map(str, runs), "--plot", str(tmp_path / "link.png")])
    assert "step" in (tmp_path / "losses.svg").read_text()
