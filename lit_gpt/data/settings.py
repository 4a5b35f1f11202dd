"""Settings that the data path reads. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lit_gpt.cli import SettingsSlice
from lit_gpt.values import PathText


@dataclass(frozen=True)
class DataSettings(SettingsSlice):
    """The data: which rows a run reads, in which order, and how they are staged."""

    train_data_dir: PathText | list[PathText] | None = None
    """Folder with the training split that scripts/prepare_data.py wrote (required); of a mixture, a list of folders,
    each as DIR or DIR:WEIGHT. Without weights a source counts by its size."""
    val_data_dir: PathText | None = None
    """Folder with the validation split; without it nothing is validated."""
    tokenizer_path: PathText | None = None
    """Tokenizer folder; its fingerprint must be the one that the data was made with. Exports copy it."""
    packing: Literal["window", "bestfit", "pad"] = "window"
    """Rows from documents: consecutive windows; documents whole where they fit; or one document a row, padded."""
    cross_document_attention: bool = False
    """Let tokens attend across document boundaries inside a row, as TinyLlama and nanochat do."""
    max_epochs: int = 1
    """Most passes over the training split. Of max_steps, max_tokens and max_epochs, the smallest ends run and schedule;
    one on the command line replaces a YAML file's."""
    seed: int = 3407
    """Seed of the initial weights and of the data order."""
    global_batch_size: int = 1024
    """Rows per step, over all ranks."""
    micro_batch_size: int = 8
    """Rows per rank per forward pass; does not change the result."""
    cache_dir: PathText | None = None
    """Folder on the node's own disk or in memory where the shards that are read now and next are staged, verified. It
    is shared with other runs, and only what the cache made there is ever removed."""
    cache_bytes: int = 20_000_000_000
    """Most bytes in cache_dir; two pools of 64 shards of the default size are 17 GB."""

    @property
    def train_sources(self) -> list[str]:
        """The training data as a list."""
        names = self.train_data_dir or []
        return [names] if isinstance(names, str) else names

    def check(self) -> None:
        super().check()
        self.require_not_negative("seed")
        self.require_at_least(1, "max_epochs", "global_batch_size", "micro_batch_size", "cache_bytes")
