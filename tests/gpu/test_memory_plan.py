"""The memory that the plan names against what the training program allocates, on one GPU."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_gpt.args import Settings
from lit_gpt.memory_plan import peak_bytes
from lit_gpt.token_store import write_store
from tests.training import EOS, documents, train

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

VOCABULARY = 32_010
STEPS = 4


@pytest.fixture(scope="module")
def rows_of_2048(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As many rows as the largest case reads, of documents of some 100 tokens, with the published vocabulary's size."""
    folder = tmp_path_factory.mktemp("rows")
    write_store(
        folder / "train", documents(4000, 1), tokenizer_fingerprint="test", vocab_size=VOCABULARY, bos_id=1, eos_id=EOS,
        shard_tokens=1_000_000,
    )  # fmt: skip
    return folder


@pytest.mark.parametrize(
    "changed",
    [
        dict(precision="bf16-mixed", micro_batch_size=8),
        dict(precision="bf16-true", micro_batch_size=16),
        dict(precision="bf16-mixed", micro_batch_size=8, global_batch_size=16),
        dict(precision="bf16-mixed", micro_batch_size=16, activation_checkpointing="full"),
        dict(precision="bf16-mixed", micro_batch_size=8, compile=False),
        dict(precision="bf16-true", micro_batch_size=4, model_name="LLaMmlein_1B"),
    ],
    ids=lambda changed: "-".join(str(value) for value in changed.values()),
)
def test_within_ten_percent(rows_of_2048: Path, tmp_path: Path, changed: dict[str, Any]) -> None:
    run: dict[str, Any] = dict(
        model_name="LLaMmlein_120M", global_batch_size=changed["micro_batch_size"], max_steps=STEPS, warmup_steps=1,
        max_epochs=4,
    ) | changed  # fmt: skip
    train(
        rows_of_2048, tmp_path, block_size=None, val_data_dir=None, accelerator="cuda", devices=1,
        save_interval_steps=100, eval_interval_steps=100, **run,
    )  # fmt: skip
    with (tmp_path / "metrics.csv").open(newline="") as file:
        *_, last = csv.DictReader(file)
    assert int(last["step"]) == STEPS
    settings = replace(Settings(), **run)
    planned = peak_bytes(settings.config, settings, 1, 1) / 2**30
    assert planned == pytest.approx(float(last["memory_gib"]), rel=0.10)
