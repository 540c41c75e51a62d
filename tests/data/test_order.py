"""The order of samples: the window of shards, how well it mixes, and mixtures of several orders."""

import pickle
from collections import Counter

import numpy as np
import pytest

from r1p_dist.data.order import GroupedOrder, MixtureOrder, SampleOrder

SIZES = [30, 10, 25, 0, 40, 15, 30]


@pytest.mark.parametrize("window", [None, 1, 3, 7, 50])
def test_every_epoch_has_every_sample_once_in_another_order(window: int | None):
    order = SampleOrder(SIZES, 5, "task", window)
    n = len(order)
    epochs = [order.take(epoch * n, (epoch + 1) * n) for epoch in range(3)]
    assert all(sorted(epoch) == list(range(150)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert order.take(0, 3 * n) == sum(epochs, [])
    assert [order.take(g, g + 1)[0] for g in range(100, 200)] == order.take(100, 200)
    assert pickle.loads(pickle.dumps(order)).take(40, 60) == order.take(40, 60)


def test_a_window_needs_only_its_own_shards():
    sizes = [30, 10, 25, 5, 40, 15, 30]
    order = SampleOrder(sizes, 5, "task", 3)
    shard_of = np.repeat(np.arange(len(sizes)), sizes)
    start, windows = 0, []
    while start < len(order):
        shards = set(shard_of[order.take(start, start + 1)])
        stop = start
        while stop < len(order) and len(shards | set(shard_of[order.take(stop, stop + 1)])) <= 3:
            shards |= set(shard_of[order.take(stop, stop + 1)])
            stop += 1
        assert stop - start == sum(sizes[shard] for shard in shards)
        windows.append(shards)
        start = stop
    assert [len(window) for window in windows] == [3, 3, 1]
    for number, first in ((0, 0), (1, sum(sizes[shard] for shard in windows[0]))):
        assert windows[number + 1] <= set(order.shards_ahead(first))


def test_a_window_mixes_almost_as_well_as_a_full_permutation():
    """100 shards of 100 samples that were mixed when they were written, as the converter does; batches of 50."""
    sizes, classes = [100] * 100, 10
    labels = np.random.default_rng(0).integers(0, classes, 10_000)
    orders = {window: SampleOrder(sizes, 0, "task", window).take(0, 10_000) for window in (None, 10, 1)}

    def spread(order: list[int]) -> float:
        """Return the variance of a class's count per batch over that of independent draws."""
        counts = np.stack([np.bincount(batch, minlength=classes) for batch in labels[order].reshape(-1, 50)])
        return float(counts.var(0).mean() / (50 * 0.1 * 0.9))

    def displacement(order: list[int]) -> float:
        return float(np.abs(np.array(order) - np.arange(10_000)).mean() / 10_000)

    assert spread(orders[None]) == pytest.approx(1, abs=0.1)
    assert spread(orders[10]) == pytest.approx(1, abs=0.1)
    assert displacement(orders[None]) == pytest.approx(1 / 3, abs=0.03)  # a third of the length for a uniform one
    assert displacement(orders[10]) == pytest.approx(1 / 3, abs=0.05)
    # How many different shards a batch of 50 comes from: about 39 of 100, 9.9 of 10, 1 of 1.
    shards = {w: np.mean([len(set(b)) for b in (np.array(o) // 100).reshape(-1, 50)]) for w, o in orders.items()}
    assert 37 < shards[None] < 42 and shards[10] > 9.8 and shards[1] == 1


@pytest.mark.parametrize("shares", [[0.75, 0.25], [0.5, 0.3, 0.2], [0.999, 0.001]])
def test_a_mixture_keeps_its_shares_and_each_part_its_order(shares: list[float]):
    sizes = [40, 9, 6][: len(shares)]
    parts = [SampleOrder([size], 1, f"part {number}") for number, size in enumerate(sizes)]
    mixture = MixtureOrder(parts, shares, 1, "task")
    taken = mixture.take(0, 2000)
    assert [index for start in range(0, 2000, 37) for index in mixture.take(start, min(start + 37, 2000))] == taken
    offsets = np.cumsum([0, *sizes])
    members = np.searchsorted(offsets, taken, side="right") - 1
    assert Counter(members.tolist()) == {number: round(2000 * share) for number, share in enumerate(shares)}
    for number, part in enumerate(parts):
        own = [index - offsets[number] for index, member in zip(taken, members, strict=True) if member == number]
        assert own == part.take(0, len(own))


def grouped(inner: SampleOrder | MixtureOrder, lengths: list[int], batch: int = 4, window: int = 5) -> GroupedOrder:
    return GroupedOrder(inner, lengths, batch, window, 3, "task")


@pytest.mark.parametrize("shards", [None, 2])
def test_a_grouped_order_has_batches_of_like_length_and_each_windows_samples(shards: int | None):
    inner = SampleOrder(SIZES, 5, "task", shards)
    lengths = np.random.default_rng(0).integers(10, 500, len(inner)).tolist()
    order = grouped(inner, lengths)
    taken = order.take(0, 600)  # four epochs of 150, in thirty windows of 20
    windows = [taken[start : start + 20] for start in range(0, 600, 20)]
    places = []
    for number, window in enumerate(windows):
        own = inner.take(20 * number, 20 * number + 20)
        batches = [window[start : start + 4] for start in range(0, 20, 4)]
        by_length = sorted(own, key=lambda index: lengths[index])
        expected = [by_length[start : start + 4] for start in range(0, 20, 4)]
        assert sorted(map(tuple, batches)) == sorted(map(tuple, expected))
        places.append(tuple(expected.index(batch) for batch in batches))
    assert len(set(places)) > 20, "the batches of a window come in a random order"


def test_a_grouped_order_is_a_function_of_the_sample_number():
    inner = SampleOrder(SIZES, 5, "task")
    lengths = [index * 7 % 31 for index in range(len(inner))]
    order = grouped(inner, lengths)
    taken = order.take(0, 300)
    for start, stop in [(299, 300), (17, 63), (0, 1), (40, 40), (38, 42)]:
        assert grouped(inner, lengths).take(start, stop) == order.take(start, stop) == taken[start:stop]
    assert pickle.loads(pickle.dumps(order)).take(100, 160) == taken[100:160]
    other = GroupedOrder(inner, lengths, 4, 5, 4, "task").take(0, 300)
    assert other != taken and sorted(other) == sorted(taken)


def test_samples_of_one_length_stay_in_their_order_within_a_batch():
    inner = SampleOrder([40], 5, "task")
    batches = np.reshape(grouped(inner, [9] * 40).take(0, 20), (5, 4)).tolist()
    assert sorted(batches) == sorted(np.reshape(inner.take(0, 20), (5, 4)).tolist())


def test_a_grouped_mixture_keeps_its_shares():
    parts = [SampleOrder([30], 1, "own"), SampleOrder([10], 1, "past")]
    mixture = MixtureOrder(parts, [0.75, 0.25], 1, "task")
    taken = grouped(mixture, list(range(40))).take(0, 200)
    for start in range(0, 200, 20):
        assert sorted(taken[start : start + 20]) == sorted(mixture.take(start, start + 20))


def test_a_grouped_order_names_the_shards_behind_its_window():
    inner = SampleOrder([10] * 6, 5, "task", 2)
    order = grouped(inner, list(range(60)))
    for start in (0, 19):  # a window of 20 is one of the inner order
        assert set(order.shards_ahead(start)) == {index // 10 for index in inner.take(20, 40)}
    assert set(order.shards_ahead(20)) == {index // 10 for index in inner.take(40, 60)}


def test_orders_never_change():
    # Written down once: a run that is resumed with a later release must go on with the same samples.
    assert SampleOrder([3, 4, 5, 2], 0, "x", 2).take(0, 14) == [9, 13, 12, 8, 11, 7, 10, 2, 1, 0, 6, 3, 5, 4]
    mixture = MixtureOrder([SampleOrder([5], 0, "a"), SampleOrder([3], 0, "b")], [0.75, 0.25], 0, "m")
    assert mixture.take(0, 12) == [6, 3, 1, 2, 7, 0, 4, 2, 5, 0, 3, 4]
    by_length = GroupedOrder(SampleOrder([8], 0, "x"), [3, 1, 4, 1, 5, 9, 2, 6], 2, 3, 0, "x")
    assert by_length.take(0, 12) == [3, 6, 0, 2, 4, 7, 7, 5, 6, 0, 1, 1]
