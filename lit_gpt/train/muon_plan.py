"""What Muon needs beside AdamW: memory, computation and traffic of a step, from the shape and the number of ranks.

The times are calculated from the assumed rates below, not measured; nothing is computed beside an exchange. With one
copy of the weights on S ranks, a rank owns one in S of the matrices of each shape (matrix_exchange.py), so that there
is little left to share where S exceeds their number: then the time is that of one matrix of each shape, and of its way
over one network port.
"""

from __future__ import annotations

from typing import NamedTuple

from lit_gpt.config import Config
from lit_gpt.train.muon import BATCH_NUMBERS, POLAR_EXPRESS

PRODUCTS_PER_S = 600e12
"""FLOP/s of an H100's bf16 products of these sizes."""
NODE_BYTES_PER_S = 300e9
"""Of one GPU, over NVLink inside a node."""
MESSAGE_S = 2e-6
"""Of each message between two ranks."""


class MuonStep(NamedTuple):
    """Of the busiest rank, in one step."""

    matrices: int
    flops: int
    sent_bytes: int
    seconds: float


def matrix_shapes(config: Config) -> dict[tuple[int, int], int]:
    """(rows, columns) of the matrices that Muon updates -> how many there are; see GPT.hidden_matrices."""
    width, hidden, keys = config.n_embd, config.intermediate_size, config.n_query_groups * config.head_size
    found: dict[tuple[int, int], int] = {}
    for shape, each in (((width, width), 2), ((keys, width), 2), ((hidden, width), 2), ((width, hidden), 1)):
        found[shape] = found.get(shape, 0) + each * config.n_layer
    return found


def matrix_numbers(config: Config) -> int:
    """Weights that Muon updates."""
    return sum(rows * columns * count for (rows, columns), count in matrix_shapes(config).items())


def working_numbers(config: Config, shards: int) -> int:
    """Most numbers of the compute dtype that a rank holds at a time beside its shards."""
    most = 0
    for (rows, columns), count in matrix_shapes(config).items():
        batch = min(max(1, BATCH_NUMBERS // (rows * columns)), -(-count // shards))
        small = min(rows, columns)
        # matrices before and after a product, and its other factor; sharded ones before that: rows as sent, as received
        # and in order
        most = max(most, batch * (2 * rows * columns + small * small if shards == 1 else 3 * rows * columns))
    return most


def muon_step(config: Config, shards: int, *, number_bytes: int, bytes_per_s: float) -> MuonStep:
    """number_bytes: of a number in the compute dtype; bytes_per_s: between its ranks, of each."""
    matrices, flops, received, exchanges = 0, 0, 0, 0
    for (rows, columns), count in matrix_shapes(config).items():
        own, small = -(-count // shards), min(rows, columns)
        matrices += own
        flops += own * len(POLAR_EXPRESS) * (4 * small * rows * columns + 2 * small**3)
        received += own * rows * columns * number_bytes * (shards - 1) // shards
        exchanges += -(-own // max(1, BATCH_NUMBERS // (rows * columns)))
    own_rows = matrix_numbers(config) * number_bytes * (shards - 1) // shards**2
    travel = 2 * (received / bytes_per_s + exchanges * (shards - 1) * MESSAGE_S)
    return MuonStep(matrices, flops, own_rows + received, flops / PRODUCTS_PER_S + travel)
