"""Loss on the validation split: each row counts once over all ranks, with the loss function of training."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lit_gpt.config import IGNORE_INDEX
from lit_gpt.data.loader import Batch, PackedDataset, padding_batch, validation_batches
from lit_gpt.data.token_store import TokenStore
from lit_gpt.train.settings import Settings


class Validation(NamedTuple):
    """Loss on the validation split."""

    loss: float
    """Nats a target."""
    perplexity: float
    bits_per_byte: float
    """Bits for each UTF-8 byte of the split's text: comparable between tokenizers."""


@torch.no_grad()
def validate(
    loss: Callable[[Batch], Tensor],
    rows: PackedDataset,
    store: TokenStore,
    *,
    micro_batch_size: int,
    max_rows: int | None,
    device: torch.device,
    before_batch: Callable[[], None] = lambda: None,
) -> Validation:
    """Mean loss over the targets of the first max_rows rows (None: of all rows).

    loss: summed over a batch's targets, in nats; store: the split that `rows` reads; before_batch may raise, on every
    rank. A collective: every rank calls it and gets the same numbers.
    """
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    batches = validation_batches(
        rows, micro_batch_size=micro_batch_size, rank=rank, world_size=world_size, max_rows=max_rows
    )
    total = torch.zeros(2, dtype=torch.float64, device=device)  # nats, targets
    for batch in batches:
        before_batch()
        total[0] += loss(batch)
        total[1] += int((batch.targets != IGNORE_INDEX).sum())
    if dist.is_initialized():
        dist.all_reduce(total)
    nats, targets = total.tolist()
    average = nats / targets
    bits_per_byte = average / math.log(2) * store.tokens / store.text_bytes
    return Validation(average, math.exp(min(average, 700)), bits_per_byte)


@torch.no_grad()
def compile_without_gradients(loss: Callable[[Batch], Tensor], settings: Settings, block_size: int) -> None:
    """Compile the graph that validation and samples run, where a run has any, before the first step.

    Later, all ranks would wait for each one that compiles. A collective: every rank calls it.
    """
    if settings.compile and (settings.val_data_dir or settings.sample_interval_steps):
        loss(padding_batch(settings.micro_batch_size, block_size))
