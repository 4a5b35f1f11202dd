"""How long a run is: the smallest of the given limits, by literal values. 25 rows of 64 tokens, batches of 4."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from lit_gpt.cli import BadInput
from lit_gpt.train.run_length import Progress, run_length
from lit_gpt.train.settings import Settings, without_recipe_limits
from tests.support.programs import run_program
from tests.support.training import command, metrics, train

START = Progress(0, 0, 0)


class Data:
    block_size, rows_per_epoch = 64, 25

    def rows_within(self, epochs: int) -> int:
        return 25 * epochs


def settings(**values: object) -> Settings:
    return Settings(**{"model_name": "debug", "block_size": 64, "global_batch_size": 4, "warmup_steps": 1, **values})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("limits", "flags", "steps", "limit"),
    [
        ({}, (), 6, "max_epochs"),  # 25 rows are six steps of 4, and one row too few
        ({"max_epochs": 2}, (), 12, "max_epochs"),
        ({"max_steps": 5}, ("max_steps",), 5, "max_steps"),
        ({"max_steps": 6}, ("max_steps",), 6, "max_steps"),
        ({"max_steps": 400}, (), 6, "max_epochs"),  # a recipe's: the data ends first
        ({"max_steps": 400, "max_epochs": 3}, ("max_steps", "max_epochs"), 18, "max_epochs"),
        ({"max_steps": 10, "max_epochs": 3}, ("max_steps",), 10, "max_steps"),  # the recipe allows three epochs
        ({"max_tokens": 4 * 256 + 255}, ("max_tokens",), 4, "max_tokens"),  # whole steps of 256 tokens
        ({"max_tokens": 1024, "max_steps": 3, "max_epochs": 2}, (), 3, "max_steps"),
    ],
)
def test_the_smallest_limit_ends_run_and_schedule(
    limits: dict[str, int], flags: tuple[str, ...], steps: int, limit: str
) -> None:
    length = run_length(settings(**limits), flags, Data(), START)
    assert length is not None
    assert (length.steps, length.limit, length.tokens) == (steps, limit, steps * 256)
    assert length.epochs == pytest.approx(steps * 4 / 25)
    assert f"end by {limit} at step {steps}" in str(length)


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ({"max_steps": 7}, "--max_steps 7: the data ends after step 6 .*--max_epochs 2"),  # 28 rows of 25
        ({"max_steps": 400}, "--max_epochs 64"),  # 1600 rows
        ({"max_steps": 401}, "--max_epochs 65"),
        ({"max_tokens": 20 * 256}, "--max_tokens 5120: the data ends after step 6 .*--max_epochs 4"),  # 80 rows
        ({"max_tokens": 255}, "--max_tokens 255: less than one step"),
    ],
)
def test_a_length_that_the_data_does_not_hold_is_refused(limits: dict[str, int], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        run_length(settings(**limits), tuple(limits), Data(), START)


def test_a_resume_that_changes_nothing_computes_the_same() -> None:
    for asked, flags, steps in (
        (settings(max_steps=400), (), 6),
        (settings(max_tokens=1100), ("max_tokens",), 4),
        (settings(max_epochs=3), ("max_epochs",), 18),
    ):
        for step in range(steps + 1):
            length = run_length(asked, flags, Data(), Progress(step, 4 * step, 4 * step))
            assert length is not None
            assert (length.steps, length.tokens) == (steps, steps * 256)


def test_rows_left_out_shorten_the_run_and_are_no_mistake() -> None:
    done = Progress(2, 8, 8, [(8, 12)])
    length = run_length(settings(max_steps=6), ("max_steps",), Data(), done)
    assert length is not None
    assert (length.steps, length.limit) == (5, "max_epochs")
    with pytest.raises(BadInput, match="--max_epochs 2"):
        run_length(settings(max_steps=12), ("max_steps",), Data(), done)


@pytest.mark.parametrize(
    ("limits", "done", "said"),
    [
        ({"max_steps": 3}, Progress(5, 20, 20), "--max_steps 3 ends the run at step 3.* step 5"),
        ({"max_tokens": 1024}, Progress(5, 20, 20), "--max_tokens 1024 ends the run at step 4"),
        ({"max_epochs": 1}, Progress(10, 40, 40), "consumed 40 rows, and 1 epochs of this data have 25.*--max_epochs"),
        ({"max_epochs": 1, "warmup_steps": 7}, START, "--warmup_steps 7 .*--max_epochs 1, which ends .* after 6 steps"),
    ],
)
def test_an_end_that_lies_behind_or_is_too_early_is_refused(limits: dict[str, int], done: Progress, said: str) -> None:
    with pytest.raises(BadInput, match=said):
        run_length(settings(**limits), (), Data(), done)


def test_a_flag_replaces_the_recipes_limits() -> None:
    recipe = settings(max_steps=400, max_tokens=10_000, max_epochs=20)

    def kept(*flags: str) -> tuple[int | None, int | None, int]:
        found = without_recipe_limits(recipe, flags)
        return found.max_steps, found.max_tokens, found.max_epochs

    assert kept() == kept("learning_rate") == (400, 10_000, 20)
    assert kept("max_steps") == (400, None, 20)
    assert kept("max_tokens", "seed") == (None, 10_000, 20)
    assert kept("max_epochs") == (None, None, 20)


@pytest.mark.slow
def test_the_program_ends_its_schedule_with_the_data(store: Path, tmp_path: Path) -> None:
    """341 rows, 32 a step: 10 steps, though the recipe says 1,000. The last learning rate is min_lr."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(dict(max_steps=1000, global_batch_size=32, micro_batch_size=32)))
    sizes = dict(max_steps=None, global_batch_size=None, micro_batch_size=None, config=recipe, eval_interval_steps=100)
    planned = run_program(command(store, tmp_path / "plan", plan="true", **sizes))
    done = train(store, tmp_path / "run", **sizes)
    told = "in all 10 steps, 20,480 tokens, 0.94 epochs; run and schedule end by max_epochs at step 10"
    assert told in planned.stdout
    assert told in done.stderr
    lines = metrics(tmp_path / "run")
    assert [int(line["step"]) for line in lines] == list(range(1, 11))
    assert float(lines[-1]["learning_rate"]) == pytest.approx(3e-4)
    for flags in ({"max_steps": 1000}, {"max_steps": 1000, "plan": "true"}):
        refused = run_program(command(store, tmp_path / "refused", **{**sizes, **flags}))
        assert refused.returncode == 2
        assert "the data ends after step 10" in refused.stderr
        assert "--max_epochs 94" in refused.stderr
