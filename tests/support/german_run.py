"""A finished run on German text, with its tokenizer, stores and three checkpoints; tests export and evaluate it."""

from __future__ import annotations

import json
from pathlib import Path

from scripts import prepare_data, train_tokenizer
from scripts.fetch_german_text import from_grammar
from tests.support.training import train

STEPS = (4, 8, 12)
"""Steps of its checkpoints."""


def make_german_run(folder: Path) -> Path:
    """Make text.jsonl, tokenizer/, data/ and run/ in `folder`; returns the run folder."""
    text, tokenizer, data, run = (folder / name for name in ("text.jsonl", "tokenizer", "data", "run"))
    documents = [document._asdict() for document in from_grammar(300)]
    text.write_text("".join(json.dumps(document, ensure_ascii=False) + "\n" for document in documents))
    train_tokenizer.main(["--source", str(text), "--destination_path", str(tokenizer), "--vocab_size", "500"])
    prepare_data.main(
        ["--source", str(text), "--tokenizer_path", str(tokenizer), "--destination_path", str(data),
         "--val_fraction", "0.1", "--workers", "1"]
    )  # fmt: skip
    train(data, run, tokenizer_path=tokenizer, keep_last_checkpoints=0)
    return run
