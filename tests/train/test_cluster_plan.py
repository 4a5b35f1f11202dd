"""The predicted step on several GPUs: beside measured steps, and the best interval between saves beside a search."""

from __future__ import annotations

import math
from typing import Any

import pytest

from lit_gpt.train.cluster_plan import cluster_lines, cluster_step, daly_interval, goodput, one_gpu_tokens_per_s
from lit_gpt.train.settings import Settings

# docs/benchmarks.md, four H100s of one host: tokens/s of one GPU alone, and of each of four.
MEASURED: list[tuple[dict[str, Any], int, int]] = [
    (dict(model_name="LLaMmlein_1B", precision="bf16-mixed", micro_batch_size=24), 83_829, 81_572),
    (dict(model_name="LLaMmlein_1B", precision="bf16-true", micro_batch_size=24), 85_562, 81_567),
    (dict(model_name="LLaMmlein_1B", precision="bf16-true", float8="tensorwise", micro_batch_size=24), 103_081, 98_562),
    (dict(model_name="LLaMmlein_7B", precision="bf16-true", micro_batch_size=4), 14_031, 12_730),
    (dict(
        model_name="LLaMmlein_1B", precision="bf16-mixed", micro_batch_size=20, global_batch_size=640,
        sharding_strategy="SHARD_GRAD_OP",
    ), 85_115, 84_483),
    (dict(
        model_name="LLaMmlein_1B", precision="bf16-true", float8="tensorwise", micro_batch_size=20,
        global_batch_size=640, sharding_strategy="SHARD_GRAD_OP",
    ), 103_373, 101_733),
]  # fmt: skip


def settings_of(case: dict[str, Any], **more: Any) -> Settings:
    return Settings(**({"global_batch_size": 4 * case["micro_batch_size"], "devices": 4, "plan": True} | case | more))


@pytest.mark.parametrize(("case", "alone", "of_four"), MEASURED)
def test_four_gpus_as_measured(case: dict[str, Any], alone: int, of_four: int) -> None:
    settings = settings_of(case)
    predicted = alone * cluster_step(settings.config, settings, 1, alone).efficiency
    assert predicted == pytest.approx(of_four, rel=0.03)


def test_one_gpu_is_itself() -> None:
    settings = settings_of(MEASURED[0][0], devices=1, global_batch_size=48)
    step = cluster_step(settings.config, settings, 1, 80_000)
    assert step.efficiency == 1
    assert step.total_s == pytest.approx(48 * 2048 / 80_000)
    assert step.transfers_s == 0


def test_what_is_sent() -> None:
    """1B, two micro-batches of 8 rows on 2 nodes of 4 GPUs; rings between the nodes: 4 ports of 40 GB/s."""
    numbers, far, near = 1_100_310_528, 160e9, 300e9
    case = dict(model_name="LLaMmlein_1B", micro_batch_size=8, global_batch_size=128)

    def sent(**more: Any) -> float:
        settings = settings_of(case, **more)
        return cluster_step(settings.config, settings, 2, 80_000).transfers_s

    hops = 7 * 2e-6 * 23
    assert sent() == pytest.approx((4 * 2 + 4) * numbers * 7 / 8 / far + 5 * hops)
    assert sent(gradient_sync="micro_batch") == pytest.approx((4 * 2 + 2 * 4) * numbers * 7 / 8 / far + 6 * hops)
    assert sent(sharding_strategy="SHARD_GRAD_OP") == pytest.approx((2 + 4) * numbers * 7 / 8 / far + 2 * hops)
    inside = (4 * 2 + 4) * numbers * 3 / 4 / near + 5 * 3 * 2e-6 * 23
    between = 2 * 1 / 2 * 4 * numbers / 4 / 40e9 + 2 * 1 * 2e-6 * 23  # each quarter has a port of its own
    assert sent(sharding_strategy="HYBRID_SHARD") == pytest.approx(inside + between)
    assert sent(sharding_strategy="NO_SHARD") == pytest.approx(2 * 7 / 8 * 4 * numbers / far + 2 * hops)


@pytest.mark.parametrize(("save", "between"), [(2.0, 86400.0), (30.0, 7200.0), (120.0, 3600.0)])
def test_the_best_interval_is_that_of_a_search(save: float, between: float) -> None:
    def lost(interval: float) -> float:  # Daly's model: time for a second of training, restarts apart
        return between * math.expm1((interval + save) / between) / interval

    best = min((lost(seconds), seconds) for seconds in range(10, 40_000))[1]
    assert daly_interval(save, between) == pytest.approx(best, rel=0.02)


def test_goodput_falls_with_gpus_and_needs_closer_saves() -> None:
    settings = settings_of(MEASURED[0][0], devices=8, plan_failures_per_gpu_day=4.7e-4)
    few, many = goodput(8, settings, 13 * 10**9), goodput(16_384, settings, 13 * 10**9)
    assert many.days_between_failures == pytest.approx(54 / 419, rel=0.01)  # as Llama 3 had it
    assert many.interval_s < few.interval_s
    assert 0.9 < many.share < few.share < 1


def test_lines_hold_each_number_of_nodes_that_divides_the_batch() -> None:
    case = dict(model_name="LLaMmlein_1B", micro_batch_size=8)
    settings = settings_of(case, devices=8, num_nodes=3, global_batch_size=6144)
    lines = list(cluster_lines(settings.config, settings, 13 * 10**9))
    rows = [words for line in lines if len(words := line.lstrip(">").split()) == 9 and words[0].isdigit()]
    assert [int(row[0]) for row in rows] == [8, 16, 24, 32, 64, 128, 256]
    assert [line.split()[1] for line in lines if line.startswith(">")] == ["24"]
    assert one_gpu_tokens_per_s(settings.config, Settings(plan=True, precision="32-true")) is None
