"""The planned memory, compared with what the training program allocates on one GPU.

Some programs run at once, since starting takes most of their time; each measures its own allocations. They are killed
before they save a checkpoint.
"""

from __future__ import annotations

import csv
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_gpt.data.token_store import write_store
from lit_gpt.train.memory_plan import peak_bytes
from lit_gpt.train.resolve import resolve_for_plan
from lit_gpt.train.settings import StepSettings
from tests.support.programs import environment
from tests.support.training import EOS, command, documents

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

VOCABULARY = 32_010
STEPS = 4
AT_ONCE = 3
"""Programs: together some 40 GiB of the GPU's memory."""
TIMEOUT_S = 240
CASES: list[dict[str, Any]] = [
    dict(precision="bf16-mixed", micro_batch_size=8),
    dict(precision="bf16-true", micro_batch_size=16),
    dict(precision="bf16-mixed", micro_batch_size=8, global_batch_size=16),
    dict(precision="bf16-mixed", micro_batch_size=16, activation_checkpointing="full"),
    dict(precision="bf16-mixed", micro_batch_size=8, compile=False),
    dict(precision="bf16-true", micro_batch_size=16, float8="tensorwise"),
    dict(precision="bf16-true", micro_batch_size=16, float8="tensorwise", activation_checkpointing="selective"),
    dict(precision="bf16-true", micro_batch_size=4, model_name="LLaMmlein_1B"),
]


@pytest.fixture(scope="module")
def rows_of_2048(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As many rows as the largest case reads, of documents of some 100 tokens, with the published vocabulary's size."""
    folder = tmp_path_factory.mktemp("rows")
    write_store(
        folder / "train", documents(4000, 1), tokenizer_fingerprint="test", vocab_size=VOCABULARY, bos_id=1, eos_id=EOS,
        shard_tokens=1_000_000,
    )  # fmt: skip
    return folder


def settings_of(case: dict[str, Any]) -> dict[str, Any]:
    return dict(
        model_name="LLaMmlein_120M", global_batch_size=case["micro_batch_size"], max_steps=STEPS, warmup_steps=1,
        max_epochs=4,
    ) | case  # fmt: skip


def memory_gib(store: Path, out_dir: Path, **settings: Any) -> float:
    """What the program logs at its last step, at which it is killed."""
    program = command(
        store, out_dir, block_size=None, val_data_dir=None, save_interval_steps=100, eval_interval_steps=100,
        **{"accelerator": "cuda", "devices": 1} | settings,
    )  # fmt: skip
    out_dir.mkdir()
    metrics, errors = out_dir / "metrics.csv", out_dir / "stderr.txt"
    with errors.open("wb") as file:
        process = subprocess.Popen(program, env=environment(), stderr=file, stdout=subprocess.DEVNULL)
    until = time.monotonic() + TIMEOUT_S
    try:
        while time.monotonic() < until:
            text = metrics.read_text() if metrics.exists() else ""
            if f"\n{STEPS}," in text and text.endswith("\n"):
                return float(list(csv.DictReader(text.splitlines()))[-1]["memory_gib"])
            assert process.poll() is None, errors.read_text()
            time.sleep(0.2)
    finally:
        process.kill()
        process.wait()
    raise AssertionError(f"step {STEPS} was not reached in {TIMEOUT_S} s: {errors.read_text()}")


@pytest.fixture(scope="module")
def found(rows_of_2048: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Future[float]]]:
    """The memory of each case, as it comes; the largest model starts first."""
    folder = tmp_path_factory.mktemp("runs")
    with ThreadPoolExecutor(AT_ONCE) as pool:
        futures = {
            number: pool.submit(memory_gib, rows_of_2048, folder / str(number), **settings_of(CASES[number]))
            for number in reversed(range(len(CASES)))
        }
        yield [futures[number] for number in range(len(CASES))]
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize(
    "number", range(len(CASES)), ids=lambda number: "-".join(str(value) for value in CASES[number].values())
)
def test_within_ten_percent(found: list[Future[float]], number: int) -> None:
    run = settings_of(CASES[number])
    settings = resolve_for_plan(replace(StepSettings(), **run))
    planned = peak_bytes(settings.config, settings, 1, 1) / 2**30
    assert planned == pytest.approx(found[number].result(), rel=0.10)
