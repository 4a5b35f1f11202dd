"""The order is a bijection, evenly spread, and frozen."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_gpt.cli import BadInput
from lit_gpt.data.order import ORDER_VERSION, Mixture, Order, Permutation, derive_key

shapes = st.lists(st.integers(0, 40), min_size=1, max_size=30).filter(any)


def test_golden_vectors() -> None:
    """Changed by hand only, together with ORDER_VERSION: runs of the past are replayed through these."""
    assert ORDER_VERSION == 1
    assert derive_key(3407, 0) == 0xCEA642336641095B
    assert Permutation(10, 1).forward(np.arange(10)).tolist() == [3, 1, 8, 2, 7, 9, 5, 4, 6, 0]
    assert Permutation(2_000_003, 3407).forward(np.array([0, 1, 2, 1_000_000, 2_000_002])).tolist() == [
        221180,
        584227,
        856058,
        741309,
        758435,
    ]
    places = Order([3, 0, 5, 1, 7], seed=3407, pool_shards=2).locate(np.arange(14, 34))
    assert places.epoch.tolist() == [0] * 2 + [1] * 16 + [2] * 2
    assert places.shard.tolist() == [4, 4, 0, 0, 0, 4, 4, 4, 2, 4, 2, 4, 4, 2, 2, 2, 4, 3, 4, 0]
    assert places.row.tolist() == [1, 4, 0, 2, 1, 1, 6, 3, 4, 0, 3, 4, 2, 2, 1, 0, 5, 0, 5, 0]
    sources, own = Mixture([2, 1], seed=3407).locate(np.arange(4090, 4102))
    assert sources.tolist() == [0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 0]
    assert own.tolist() == [2726, 2727, 2728, 1364, 2729, 2730, 2731, 1365, 2732, 2733, 2734, 2735]


def plain_cipher(index: int, size: int, key: int) -> int:
    """The cipher once more, in Python's own integers: what another implementation has to do."""
    bits = 2**64 - 1
    height = next(side for side in range(1, size + 1) if side * side >= size)
    width = -(-size // height)
    while True:
        halves, moduli = list(divmod(index, width)), (height, width)
        for number in range(8):
            mixed = (halves[1 - number % 2] + derive_key(key, number)) * 0xBF58476D1CE4E5B9 & bits
            mixed = (mixed ^ mixed >> 32) * 0x94D049BB133111EB & bits
            turn = (mixed >> 32) * moduli[number % 2] >> 32
            halves[number % 2] = (halves[number % 2] + turn) % moduli[number % 2]
        index = halves[0] * width + halves[1]
        if index < size:
            return index


@pytest.mark.parametrize("size", [1, 2, 5, 64, 1000, 4097])
def test_the_cipher_is_what_plain_integers_say(size: int) -> None:
    expected = [plain_cipher(index, size, key=11) for index in range(size)]
    assert Permutation(size, key=11).forward(np.arange(size)).tolist() == expected


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6, 7, 8, 9, 63, 64, 65, 1000, 65_537])
def test_a_permutation_is_a_bijection_with_its_inverse(size: int) -> None:
    indices = np.arange(size)
    image = Permutation(size, key=7).forward(indices)
    assert np.array_equal(np.sort(image), indices)
    assert np.array_equal(Permutation(size, key=7).inverse(image), indices)


@pytest.mark.slow
@pytest.mark.parametrize("size", [3, 5, 7, 16])
def test_permutations_are_evenly_spread_over_keys(size: int) -> None:
    """Chi-square of (place, image) over 4,000 keys: mean (size - 1)^2, bound five standard deviations above."""
    keys = 4000
    counts = np.zeros((size, size))
    for key in range(keys):
        counts[np.arange(size), Permutation(size, key).forward(np.arange(size))] += 1
    chi_square = ((counts - keys / size) ** 2 / (keys / size)).sum()
    freedom = (size - 1) ** 2
    assert chi_square < freedom + 5 * (2 * freedom) ** 0.5


def test_neighbours_are_scattered() -> None:
    """Steps between images of neighbours: as many up as down, and a third of the range long on the mean."""
    image = Permutation(100_000, key=7).forward(np.arange(100_000)) / 100_000
    steps = np.diff(image)
    assert abs((steps > 0).mean() - 0.5) < 0.01
    assert abs(np.abs(steps).mean() - 1 / 3) < 0.01


@settings(max_examples=60, deadline=None)
@given(shapes, st.integers(0, 2**64 - 1), st.integers(1, 9), st.integers(0, 5))
def test_every_epoch_shows_every_row_once_and_the_inverse_finds_it(
    shard_rows: list[int], seed: int, pool_shards: int, epoch: int
) -> None:
    order = Order(shard_rows, seed, pool_shards)
    slots = epoch * order.rows_per_epoch + np.arange(order.rows_per_epoch)
    places = order.locate(slots)
    assert set(places.epoch.tolist()) == {epoch}
    expected = [(shard, row) for shard, rows in enumerate(shard_rows) for row in range(rows)]
    assert sorted(zip(places.shard.tolist(), places.row.tolist(), strict=True)) == expected
    assert np.array_equal(order.slot_of(epoch, places.shard, places.row), slots)
    scrambled = np.random.default_rng(0).permutation(slots)
    assert np.array_equal(order.locate(scrambled).row, places.row[scrambled - slots[0]])
    for slot in slots.tolist():
        pool = order.pools(slot, 1)[0]
        assert int(places.shard[slot - slots[0]]) in pool
        assert len(pool) <= pool_shards


def test_scalars_and_shapes_are_kept() -> None:
    order = Order([5, 9], seed=1)
    line = order.locate(np.arange(12))
    assert int(order.locate(7).row) == int(line.row[7])
    assert order.locate(np.arange(12).reshape(3, 4)).shard.tolist() == line.shard.reshape(3, 4).tolist()
    assert int(order.slot_of(0, line.shard[7], line.row[7])) == 7


def test_epochs_seeds_and_streams_differ() -> None:
    def rows(seed: int, epoch: int, stream: int) -> list[int]:
        return Order([1000], seed, stream=stream).locate(1000 * epoch + np.arange(1000)).row.tolist()

    variants = [rows(1, 0, 0), rows(2, 0, 0), rows(1, 1, 0), rows(1, 0, 1)]
    assert len({tuple(variant) for variant in variants}) == 4


def test_pools_go_on_into_the_next_epoch() -> None:
    order = Order([1] * 10, seed=1, pool_shards=4)
    pools = order.pools(9, 3)
    assert [len(pool) for pool in pools] == [2, 4, 4]
    assert sorted(np.concatenate([*order.pools(0, 3)]).tolist()) == list(range(10))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0.1, 100), min_size=1, max_size=5), st.integers(0, 2**32), st.integers(0, 5))
def test_a_mixture_gives_each_source_its_slots_in_order(weights: list[float], seed: int, period: int) -> None:
    mixture = Mixture(weights, seed)
    slots = period * 4096 + np.arange(4096)
    sources, own = mixture.locate(slots)
    for source, count in enumerate(mixture.counts.tolist()):
        assert abs(count - weights[source] * 4096 / sum(weights)) <= 1
        mine = own[sources == source]
        assert mine.tolist() == list(range(period * count, (period + 1) * count))
        assert np.array_equal(mixture.slot_of(source, mine), slots[sources == source])


def test_a_mixture_ends_before_the_first_source_runs_out() -> None:
    mixture = Mixture([3, 1], seed=1)
    end = mixture.slots_within([5000, 9000])
    assert mixture.consumed(end) == [5000, end - 5000]
    sources, own = mixture.locate(np.arange(end + 1))
    assert own[sources == 0].max() == 5000
    assert sources[-1] == 0
    assert mixture.counts.tolist() == [3072, 1024]


@pytest.mark.parametrize("weights", [[1, 0], [1, -2], [1, 1e-9]])
def test_bad_weights_are_refused(weights: list[float]) -> None:
    with pytest.raises(BadInput, match="weight"):
        Mixture(weights, seed=1)


def test_no_rows_are_refused() -> None:
    with pytest.raises(BadInput, match="no rows"):
        Order([0, 0], seed=1)


def test_fifteen_thousand_shards_open_at_once() -> None:
    begin = time.perf_counter()
    order = Order(np.full(15_000, 32_768), seed=1)
    order.locate(3 * order.rows_per_epoch + 12_345_678)
    assert time.perf_counter() - begin < 0.2
