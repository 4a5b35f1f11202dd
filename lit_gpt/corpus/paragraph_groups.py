"""Paragraph deduplication, between the passes: which paragraphs are equal.

The keys are divided into partitions by their high bits, each small enough for memory; a partition's keys come from
the parts' sorted files, and are sorted together. Exact, and the same for any number of tasks.
Costs: about KEY_BYTES of memory a key of one partition.
"""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from datatrove.pipeline.base import PipelineStep

from lit_gpt.corpus.paragraph_keys import sorted_order
from lit_gpt.corpus.parts import Layout
from lit_gpt.files import publishing

PARTITION_KEYS = 3 << 18
MOST_PARTITIONS = 1 << 12
"""A task reads a stretch of each part for each partition; 50 billion keys so still take less than 1 GB."""
KEY_BYTES = 80
"""Memory for each key of a partition."""


def number_of_partitions(keys: int) -> int:
    return min(max(1, -(-keys // PARTITION_KEYS)), MOST_PARTITIONS)


class Keys(NamedTuple):
    """A part's keys, in their file. They are read, not mapped: of a mapped file the kernel counts much more than what
    was looked at as the process's memory, a stretch of up to 2 MB for each key."""

    path: Path
    keys: int
    offset: int

    @staticmethod
    def open(path: Path) -> Keys:
        with open(path, "rb") as file:
            np.lib.format.read_magic(file)
            shape, _, _ = np.lib.format.read_array_header_1_0(file)
            return Keys(path, shape[1], file.tell())

    def between(self, low: int, high: int) -> npt.NDArray[np.uint64]:
        """(3, n): keys and spots, of the keys whose high 64 bits are at least `low` and less than `high`."""
        with open(self.path, "rb", buffering=0) as file:

            def at(number: int) -> int:
                return int.from_bytes(os.pread(file.fileno(), 8, self.offset + 8 * number), "little")

            begin, end = (bisect_left(range(self.keys), edge, key=at) for edge in (low, high))
            rows = []
            for row in range(3):
                file.seek(self.offset + 8 * (row * self.keys + begin))
                rows.append(np.fromfile(file, np.uint64, end - begin))
            return np.stack(rows)


def open_keys(layout: Layout, parts: int) -> list[Keys]:
    return [Keys.open(layout.of_dedup("keys.npy", part)) for part in range(parts)]


def partitions(layout: Layout, parts: int) -> int:
    return number_of_partitions(sum(one.keys for one in open_keys(layout, parts)))


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
        count = number_of_partitions(sum(one.keys for one in keys))
        for partition in range(rank, count, world_size):
            members, bounds = groups_of(keys, partition, count)
            for kind, array in (("members.npy", members), ("bounds.npy", bounds)):
                with publishing(self._layout.of_dedup(kind, partition)) as partial, open(partial, "wb") as file:
                    np.save(file, array)
        yield from ()


def groups_of(
    keys: list[Keys], partition: int, partitions: int
) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.int64]]:
    """Members and bounds of the groups in a partition of the parts' keys."""
    edges = [(number << 64) // partitions for number in (partition, partition + 1)]
    slices = [one.between(*edges) for one in keys]
    sizes = [one.shape[1] for one in slices]
    high, low, spots = np.concatenate(slices, axis=1)
    del slices
    order = sorted_order(high, low)
    high, low = high[order], low[order]
    same = (high[1:] == high[:-1]) & (low[1:] == low[:-1])
    del high, low
    first = np.concatenate([[True], ~same])[: len(order)]
    last = np.concatenate([~same, [True]])[: len(order)]
    equal = ~(first & last)
    order = order[equal]
    parts = np.searchsorted(np.cumsum(sizes), order, side="right")
    members = np.stack([parts.astype(np.uint64), spots[order]])
    bounds = np.append(np.flatnonzero(first[equal]), members.shape[1])
    return members, bounds.astype(np.int64)
