"""What tests of the export share: a tokenizer, and a run folder with checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lit_gpt.config import Config
from lit_gpt.data.tokenizer import Tokenizer
from lit_gpt.export.parity import GERMAN_TEXT
from lit_gpt.model.gpt import GPT, initialize
from tests.checkpoint.test_checkpoint import save
from tests.support.small_tokenizer import write_byte_level


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a byte-level tokenizer of 300 ids, which the vocabulary pads to 320."""
    return write_byte_level(tmp_path_factory.mktemp("tokenizer"), [GERMAN_TEXT])


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer_path: Path) -> Path:
    """A run folder with a full checkpoint at step 7 and the same weights, sharded, at step 8."""
    folder = tmp_path_factory.mktemp("run")
    tokenizer = Tokenizer.from_folder(tokenizer_path)
    model = GPT(Config.from_name("debug", vocab_size=300))
    initialize(model, seed=1)
    optimizer = torch.optim.AdamW(model.parameters())
    facts = {
        "slot": 0, "tokens": 0, "settings": {}, "val_data_dir": None,
        "tokenizer_path": str(tokenizer_path), "tokenizer_fingerprint": tokenizer.fingerprint,
    }  # fmt: skip
    save(folder, {**facts, "step": 7}, model, optimizer, full=True)
    save(folder, {**facts, "step": 8}, model, optimizer, full=False)
    return folder
