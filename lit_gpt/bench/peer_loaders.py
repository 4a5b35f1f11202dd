"""Two common loaders, written plainly, to measure ours against; training never uses them.

The usual one cuts a memory-mapped stream into rows, behind one DataLoader worker. The published LLäMmlein code's makes
one row of each document, tokenised in the worker, cut into chunks of block_size + 2 and padded.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset

from lit_gpt.data.token_store import HEADER_BYTES, TokenStore
from lit_gpt.data.tokenizer import Tokenizer

_PADDING = -1


class Blocks(Dataset[torch.Tensor]):
    """Rows of a memory map, whatever documents they cut."""

    def __init__(self, store: TokenStore, block_size: int) -> None:
        self.block_size = block_size
        self.maps = [np.memmap(store.path / f"{shard.name}.tokens", "<u2", "r", HEADER_BYTES) for shard in store.shards]
        self.rows = [
            (shard, row * block_size)
            for shard, entry in enumerate(store.shards)
            for row in range(entry.tokens // block_size)
        ]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> torch.Tensor:
        shard, start = self.rows[index]
        return torch.from_numpy(self.maps[shard][start : start + self.block_size].astype(np.int64))


class DocumentRows(IterableDataset[torch.Tensor]):
    """One document, or one chunk of a longer one, a row."""

    def __init__(self, texts: list[str], tokenizer_path: Path, block_size: int) -> None:
        self.texts, self.tokenizer_path, self.width = texts, tokenizer_path, block_size + 2

    def __iter__(self) -> Iterator[torch.Tensor]:
        tokenizer = Tokenizer.from_folder(self.tokenizer_path)
        for text in self.texts:
            ids = [*tokenizer.encode(text), tokenizer.eos_id]
            for start in range(0, len(ids), self.width):
                part = torch.tensor(ids[start : start + self.width])
                yield torch.nn.functional.pad(part, (0, self.width - len(part)), value=_PADDING)


def consume(batches: Iterable[torch.Tensor]) -> tuple[float, float]:
    """(inputs with padding, tokens without) a second, from the first batch on: the worker's start does not count."""
    inputs = tokens = 0
    begin = None
    for batch in batches:
        if begin is None:
            begin = time.perf_counter()
            continue
        inputs += batch.numel()
        tokens += int((batch != _PADDING).sum())
    seconds = time.perf_counter() - (begin or 0.0)
    return inputs / seconds, tokens / seconds
