"""Whether all ranks run the same: settings, choices, data and run folder are compared before the first step.

Ranks that differ (a stale copy of a data set or a YAML file on one node, another environment) would train on together,
or hang. Folders that may differ from node to node are left out: what is read from them is compared by its ids.
Cost: one number a rank; only where these differ, the values themselves.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
import xxhash

from lit_gpt.cli import EXIT_BAD_INPUT, KnownBadInput
from lit_gpt.launch.job import host
from lit_gpt.launch.tally import tally

NODE_FOLDERS = ("train_data_dir", "val_data_dir", "tokenizer_path", "cache_dir")


def require_equal_ranks(values: Mapping[str, Any]) -> None:
    """If `values` are not the same everywhere, raise KnownBadInput on rank 0, and end the others with its exit code.

    A collective over gloo: every rank calls it.
    """
    if not dist.is_initialized():
        return
    ours = {name: json.dumps(value, sort_keys=True, default=str) for name, value in values.items()}
    digest = xxhash.xxh3_64_intdigest(json.dumps(ours, sort_keys=True).encode()) >> 1  # fits int64
    largest, smallest = tally([digest, -digest], "max")
    if largest == -smallest:
        return
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, (host(), ours))
    if dist.get_rank():
        sys.exit(EXIT_BAD_INPUT)
    raise KnownBadInput(difference(everywhere))


def difference(ranks: list[tuple[str, dict[str, str]]]) -> str:
    """The first rank that differs from rank 0, in what, and how many others do; ranks: (host, values) of each."""
    (first_host, first), *_ = ranks
    others = [number for number, (_, values) in enumerate(ranks) if values != first]
    name, values = ranks[others[0]]
    said = "; ".join(
        f"{key} is {values.get(key)} there and {first.get(key)} on rank 0"
        for key in sorted({*first, *values})
        if values.get(key) != first.get(key)
    )
    more = f" (and {len(others) - 1} more ranks differ)" if len(others) > 1 else ""
    return f"rank {others[0]} on {name} differs from rank 0 on {first_host}{more}: {said}. Make them equal"
