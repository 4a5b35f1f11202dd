"""Paragraph deduplication, between the passes: which paragraphs are equal.

The keys are divided into partitions by their high bits, each small enough for memory; a partition's keys come from
the parts' sorted files, and are sorted together. Exact, and the same for any number of tasks.
Costs: about 200 bytes of memory a key of one partition.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from datatrove.pipeline.base import PipelineStep

from lit_gpt.corpus.paragraph_keys import sorted_order
from lit_gpt.corpus.parts import Layout
from lit_gpt.files import publishing

PARTITION_KEYS = 3 << 18


def number_of_partitions(keys: int) -> int:
    return max(1, -(-keys // PARTITION_KEYS))


def open_keys(layout: Layout, parts: int) -> list[npt.NDArray[np.uint64]]:
    return [np.load(layout.of_dedup("keys.npy", part), mmap_mode="r") for part in range(parts)]


def partitions(layout: Layout, parts: int) -> int:
    return number_of_partitions(sum(array.shape[1] for array in open_keys(layout, parts)))


class GroupStep(PipelineStep):
    """Writes, for a partition: .members.npy (2, m): part and spot of each paragraph that has an equal, group by group,
    in the order of the sources; .bounds.npy: where each group begins, and m."""

    name = "group paragraphs"
    type = "dedup"

    def __init__(self, layout: Layout, parts: int) -> None:
        super().__init__()
        self._layout, self._parts = layout, parts

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        keys = open_keys(self._layout, self._parts)
        count = number_of_partitions(sum(array.shape[1] for array in keys))
        for partition in range(rank, count, world_size):
            members, bounds = groups_of(keys, partition, count)
            for kind, array in (("members.npy", members), ("bounds.npy", bounds)):
                with publishing(self._layout.of_dedup(kind, partition)) as partial, open(partial, "wb") as file:
                    np.save(file, array)
        yield from ()


def groups_of(
    keys: list[npt.NDArray[np.uint64]], partition: int, partitions: int
) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.int64]]:
    """Members and bounds of the groups in a partition of the parts' keys."""
    edges = [(number << 64) // partitions for number in (partition, partition + 1)]
    slices, parts = [], []
    for part, array in enumerate(keys):
        begin = np.searchsorted(array[0], np.uint64(edges[0]))
        end = array.shape[1] if edges[1] >> 64 else np.searchsorted(array[0], np.uint64(edges[1]))
        slices.append(np.asarray(array[:, begin:end]))
        parts.append(np.full(end - begin, part, np.uint64))
    high, low, spots = np.concatenate(slices, axis=1) if slices else np.zeros((3, 0), np.uint64)
    order = sorted_order(high, low)
    high, low = high[order], low[order]
    same = (high[1:] == high[:-1]) & (low[1:] == low[:-1])
    first = np.concatenate([[True], ~same])[: len(order)]
    last = np.concatenate([~same, [True]])[: len(order)]
    equal = ~(first & last)
    members = np.stack([np.concatenate(parts)[order[equal]], spots[order[equal]]])
    bounds = np.append(np.flatnonzero(first[equal]), members.shape[1])
    return members, bounds.astype(np.int64)
