"""Batches for training: tokens, targets and cu_seqlens of rows, read ahead by one thread, one step at a time.

Row j of a micro-batch has the slot first_slot + (micro * world_size + rank) * micro_batch_size + j, so a step has the
same rows for every number of ranks and every micro-batch. The slot of the next step to train is the whole state: what
was read ahead does not count, and a loader opened at that slot goes on from there.

Costs: a step's rows are read at once; with those read ahead, two or three steps are held, at 6 bytes a token. There are
no worker processes: passing batches between processes costs more than making them.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from types import TracebackType
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from lit_gpt.cli import BadInput
from lit_gpt.config import IGNORE_INDEX
from lit_gpt.data.row_reader import RowReader

CU_SEQLENS_MULTIPLE = 64
"""A batch's cu_seqlens has a multiple of this many entries."""
_POLL_S = 1.0
"""How often a waiting consumer checks that the prefetch thread is alive."""


class Batch(NamedTuple):
    """Rows of one forward pass. B: rows, T: block_size."""

    tokens: torch.Tensor
    """(B, T) uint16, or int32 for a vocabulary above 65,535: cast on the device, half the bytes over the bus."""
    targets: torch.Tensor
    """(B, T) int32; IGNORE_INDEX where a document ends and on padding."""
    cu_seqlens: torch.Tensor
    """int32: where each segment starts in the B * T tokens, then B * T up to a multiple of CU_SEQLENS_MULTIPLE."""
    slots: NDArray[np.int64]
    """(B,) the rows' slots."""


class Step(NamedTuple):
    """What one rank computes in one optimizer step."""

    first_slot: int
    rows: int
    """Rows over all ranks. The next step begins at first_slot + rows, or after the rows that are left out there."""
    batches: tuple[Batch, ...]
    targets: int
    """Valid targets of this rank."""
    digest: int
    """Of this rank's rows; the step's is the sum over all ranks modulo 2**64."""


class PackedDataset(RowReader):
    """A RowReader whose rows come as tensors. Used by one thread at a time."""

    def read(self, slots: NDArray[np.int64]) -> tuple[Batch, int]:
        """The rows of `slots` as one batch, and their digest."""
        batches, digest = self.read_batches(slots[None])
        return batches[0], digest

    def read_batches(self, slots: NDArray[np.int64], *, pin_memory: bool = False) -> tuple[tuple[Batch, ...], int]:
        """A batch for each row of `slots` (batches, B), and the digest of all; a slot below 0 gives padding."""
        micro_batches, rows = slots.shape
        shape = (micro_batches, rows, self.block_size)
        narrow = self.dtype.itemsize == 2
        tokens = torch.empty(shape, dtype=torch.uint16 if narrow else torch.int32, pin_memory=pin_memory)
        targets = torch.empty(shape, dtype=torch.int32, pin_memory=pin_memory)
        flat = (-1, self.block_size)
        filled = self.fill(slots.reshape(-1), tokens.numpy().reshape(flat), targets.numpy().reshape(flat))
        size = rows * self.block_size
        cuts = np.searchsorted(filled.cu_seqlens, np.arange(micro_batches + 1) * size)
        batches = []
        for micro in range(micro_batches):
            found = filled.cu_seqlens[cuts[micro] : cuts[micro + 1] + 1] - micro * size
            cu_seqlens = torch.empty(cu_seqlens_entries(len(found)), dtype=torch.int32, pin_memory=pin_memory)
            array = cu_seqlens.numpy()
            array[: len(found)] = found
            array[len(found) :] = size
            batches.append(Batch(tokens[micro], targets[micro], cu_seqlens, slots[micro]))
        return tuple(batches), filled.digest


def cu_seqlens_entries(needed: int) -> int:
    """Length of a cu_seqlens that needs so many entries: a compromise between few different lengths, for which code is
    compiled, and few empty segments, which attention kernels visit one by one."""
    return -(-needed // CU_SEQLENS_MULTIPLE) * CU_SEQLENS_MULTIPLE


def full_rows(rows: int, block_size: int) -> torch.Tensor:
    """cu_seqlens of a batch whose rows are one segment each, padded as those of read_batches are."""
    cu_seqlens = torch.arange(rows + 1, dtype=torch.int32) * block_size
    return F.pad(cu_seqlens, (0, cu_seqlens_entries(rows + 1) - len(cu_seqlens)), value=rows * block_size)


def padding_batch(rows: int, block_size: int) -> Batch:
    """A batch of the shape that training has, without a target."""
    tokens = torch.zeros(rows, block_size, dtype=torch.int32)
    targets = torch.full((rows, block_size), IGNORE_INDEX, dtype=torch.int32)
    return Batch(tokens, targets, full_rows(rows, block_size), np.full(rows, -1))


class StepLoader:
    """Iterates over the steps of one rank from `first_slot` on; a thread reads `prefetch_steps` ahead.

    It passes over the ranges of slots in `left_out` (see step_stretches), and ends before the first step for which the
    data does not suffice, which is the same step on every rank.
    """

    def __init__(
        self,
        dataset: PackedDataset,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        first_slot: int = 0,
        left_out: Sequence[tuple[int, int]] = (),
        max_steps: int | None = None,
        pin_memory: bool = False,
        prefetch_steps: int = 2,
    ) -> None:
        check_batch_sizes(global_batch_size, micro_batch_size, world_size)
        require_a_step(dataset.total_rows, global_batch_size, dataset.block_size)
        self._dataset = dataset
        self._pin_memory = pin_memory
        self._rows = global_batch_size
        micros = global_batch_size // (micro_batch_size * world_size)
        self._offsets = (
            (np.arange(micros)[:, None] * world_size + rank) * micro_batch_size + np.arange(micro_batch_size)
        ).astype(np.int64)
        self._stretches = step_stretches(first_slot, global_batch_size, dataset.total_rows, left_out)
        steps = sum(map(len, self._stretches))
        self.steps = steps if max_steps is None else min(steps, max_steps)
        """Steps until it ends."""
        self._waited_s = 0.0
        self._closed = threading.Event()
        self._ready: queue.Queue[Step | BaseException | None] = queue.Queue(maxsize=max(1, prefetch_steps))
        self._thread = threading.Thread(target=self._prefetch, name="prefetch", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Step]:
        return self

    def __next__(self) -> Step:
        asked = time.perf_counter()
        item = self._next_item()
        self._waited_s += time.perf_counter() - asked
        if item is None:
            self._put(None)  # asked again, it still ends
            raise StopIteration
        if isinstance(item, BaseException):
            self.close()
            raise RuntimeError(f"reading ahead failed: {item}") from item
        return item

    def take_wait_s(self) -> float:
        """Seconds that the consumer has waited for data since the last call."""
        waited_s, self._waited_s = self._waited_s, 0.0
        return waited_s

    def _next_item(self) -> Step | BaseException | None:
        while True:
            try:
                return self._ready.get(timeout=_POLL_S)
            except queue.Empty:
                if self._closed.is_set():
                    raise RuntimeError("the loader is closed") from None
                if not self._thread.is_alive() and self._ready.empty():
                    raise RuntimeError("the prefetch thread ended without a word") from None

    def _prefetch(self) -> None:
        try:
            for first_slot in islice(chain.from_iterable(self._stretches), self.steps):
                if not self._put(self._read(first_slot)):
                    return
            self._put(None)
        except BaseException as error:  # noqa: BLE001 - handed to the consumer, who raises it
            self._put(error)

    def _read(self, first_slot: int) -> Step:
        batches, digest = self._dataset.read_batches(first_slot + self._offsets, pin_memory=self._pin_memory)
        targets = sum(int(np.count_nonzero(batch.targets.numpy() != IGNORE_INDEX)) for batch in batches)
        return Step(first_slot, self._rows, batches, targets, digest)

    def _put(self, item: Step | BaseException | None) -> bool:
        """Hand an item over; False if the loader was closed meanwhile."""
        while not self._closed.is_set():
            try:
                self._ready.put(item, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def close(self) -> None:
        """Stop reading ahead and wait for the thread."""
        self._closed.set()
        self._thread.join()

    def __enter__(self) -> StepLoader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def step_stretches(first_slot: int, rows: int, total_rows: int, left_out: Sequence[tuple[int, int]]) -> list[range]:
    """The first slot of every step of `rows` rows from `first_slot` on; a range for each stretch between `left_out`.

    left_out holds (first slot, slot after the last); a step that would touch such a range begins after it.
    """
    stretches = []
    for begin, end in [*sorted(left_out), (total_rows, total_rows)]:
        steps = max(0, min(begin, total_rows) - first_slot) // rows
        stretches.append(range(first_slot, first_slot + steps * rows, rows))
        first_slot = max(first_slot, end)
    return stretches


def steps_left(first_slot: int, rows: int, total_rows: int, left_out: Sequence[tuple[int, int]]) -> int:
    """Steps of `rows` rows from `first_slot` to the end of the data; arguments as step_stretches has them."""
    return sum(map(len, step_stretches(first_slot, rows, total_rows, left_out)))


def require_a_step(total_rows: int, global_batch_size: int, block_size: int) -> None:
    """Raise BadInput if the data does not have the rows of one step."""
    if total_rows < global_batch_size:
        raise BadInput(
            f"the data has {total_rows} rows of {block_size} tokens, too few for one step of "
            f"global_batch_size={global_batch_size}: take a smaller batch, more data or more max_epochs"
        )


def check_batch_sizes(global_batch_size: int, micro_batch_size: int, world_size: int) -> None:
    """Raise BadInput, which lists valid sizes, for batch sizes that do not divide a step's rows evenly."""
    for name, value in (("global_batch_size", global_batch_size), ("micro_batch_size", micro_batch_size)):
        if value < 1:
            raise BadInput(f"{name}={value} rows: must be at least 1")
    together = world_size * micro_batch_size
    if global_batch_size % together == 0:
        return
    below = global_batch_size // together * together
    globals_ = " or ".join(str(size) for size in (below, below + together) if size)
    share, rest = divmod(global_batch_size, world_size)
    micros = [size for size in range(1, share + 1) if share % size == 0] if rest == 0 else []
    choice = f"micro_batch_size {', '.join(map(str, micros))} or " if micros else ""
    raise BadInput(
        f"global_batch_size={global_batch_size} rows is no multiple of {world_size} processes x "
        f"micro_batch_size={micro_batch_size}. Valid: {choice}global_batch_size {globals_}"
    )


def validation_batches(
    dataset: PackedDataset, *, micro_batch_size: int, rank: int, world_size: int, max_rows: int | None = None
) -> Iterator[Batch]:
    """This rank's batches of the first rows of epoch 0 (all, or max_rows); over all ranks each row comes once.

    Every rank yields the same number of batches, filled up with rows of padding, which have no target.
    """
    rows = dataset.rows_per_epoch if max_rows is None else min(max_rows, dataset.rows_per_epoch)
    together = world_size * micro_batch_size
    for start in range(0, rows, together):
        slots = start + rank * micro_batch_size + np.arange(micro_batch_size)
        yield dataset.read(np.where(slots < rows, slots, -1))[0]
