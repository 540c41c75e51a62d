"""The order of a task's samples: pure functions of seed, task and sample number, whatever the ranks and workers.

The g-th sample of a task is perm(seed, task, g // n)[g mod n] for n samples, so training straddles epochs and no sample
is dropped or padded.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np


def digest_number(*parts: object) -> int:
    """Return 64 bits that depend on the parts alone; Python's own hash() differs from process to process."""
    digest = hashlib.sha256("\0".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "little")


@functools.lru_cache(maxsize=8)  # a batch straddles few epochs, windows and blocks
def permutation(n: int, *parts: object) -> np.ndarray:
    """Return 0 ... n - 1 in an order that depends on the parts alone."""
    # numpy guarantees the raw stream of a bit generator for ever, but not what Generator.permutation makes of it.
    return np.argsort(np.random.PCG64(digest_number(*parts)).random_raw(n), kind="stable")


class SampleOrder:
    """The order of the samples of a data set that lies in shards.

    window: None permutes a whole epoch. A number permutes the shards of an epoch, and then the samples of that many
    shards at a time: only so many shards are needed at once, and with samples that were mixed when the shards were
    written it is close to a full permutation.
    """

    def __init__(self, shard_sizes: Sequence[int], seed: int, name: str, window: int | None = None) -> None:
        self._starts = np.cumsum([0, *shard_sizes])
        self._seed, self._name, self._window = seed, name, window
        self._n = int(self._starts[-1])

    def __len__(self) -> int:
        return self._n

    @property
    def shard_count(self) -> int:
        return len(self._starts) - 1

    def take(self, start: int, stop: int) -> list[int]:
        """Return the data set's indices of the samples start, start + 1, ..., stop - 1."""
        order: list[int] = []
        while start < stop:
            epoch, number, first, last = self._place(start)
            count = min(stop, last) - start
            order += self._indices(epoch, number)[start - first : start - first + count].tolist()
            start += count
        return order

    def shards_ahead(self, start: int) -> list[int]:
        """Return the shards that come after those which the sample `start` is permuted among."""
        *_, last = self._place(start)
        return self._shards(*self._place(last)[:2])

    def _place(self, start: int) -> tuple[int, int, int, int]:
        """Return (epoch, number of its window, first sample of the window, first sample after it)."""
        epoch, position = divmod(start, self._n)
        _, ends = self._epoch(epoch)
        number = int(np.searchsorted(ends, position, side="right"))
        first = int(ends[number - 1]) if number else 0
        return epoch, number, epoch * self._n + first, epoch * self._n + int(ends[number])

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (the shards of an epoch in their order, where each window ends, in samples)."""
        if self._window is None:
            return np.arange(self.shard_count), np.array([self._n])
        shards = permutation(self.shard_count, "shards", self._seed, self._name, epoch)
        ends = np.cumsum(np.diff(self._starts)[shards])
        return shards, np.append(ends[self._window - 1 : -1 : self._window], self._n)

    def _shards(self, epoch: int, number: int) -> list[int]:
        shards, _ = self._epoch(epoch)
        return shards.tolist() if self._window is None else shards[number * self._window :][: self._window].tolist()

    def _indices(self, epoch: int, number: int) -> np.ndarray:
        if self._window is None:
            return permutation(self._n, "order", self._seed, self._name, epoch)
        spans = [np.arange(self._starts[shard], self._starts[shard + 1]) for shard in self._shards(epoch, number)]
        indices = np.concatenate(spans)
        return indices[permutation(len(indices), "order", self._seed, self._name, epoch, number)]


class GroupedOrder:
    """Another order with samples of like length side by side, so that a batch of them needs little padding.

    Each `window` batches of the other order are sorted by length and cut into batches again, which come in a random
    order. A window has exactly the other order's samples, and a sample stays a pure function of its number.
    """

    def __init__(
        self,
        order: SampleOrder | MixtureOrder,
        lengths: Sequence[int],
        batch_size: int,
        window: int,
        seed: int,
        name: str,
    ) -> None:
        """lengths: one per index of the data set. batch_size: of a micro batch of all ranks together."""
        self._order, self._lengths = order, np.asarray(lengths)
        self._batch_size, self._window, self._seed, self._name = batch_size, window, seed, name
        self._latest: tuple[int, list[int]] = (-1, [])  # consecutive batches are of one window

    def take(self, start: int, stop: int) -> list[int]:
        """Return the data set's indices of the samples start, start + 1, ..., stop - 1."""
        size = self._batch_size * self._window
        taken: list[int] = []
        while start < stop:
            number, first = divmod(start, size)
            taken += self._sorted_window(number)[first : first + stop - start]
            start = min(stop, (number + 1) * size)
        return taken

    def shards_ahead(self, start: int) -> list[int]:
        """Return the shards that come after those which the window of the sample `start` ends in."""
        size = self._batch_size * self._window
        return self._order.shards_ahead(start // size * size + size - 1)

    def _sorted_window(self, number: int) -> list[int]:
        if self._latest[0] != number:
            size = self._batch_size * self._window
            indices = np.array(self._order.take(number * size, (number + 1) * size))
            by_length = indices[np.argsort(self._lengths[indices], kind="stable")]
            batches = by_length.reshape(self._window, self._batch_size)
            order = permutation(self._window, "lengths", self._seed, self._name, number)
            self._latest = number, batches[order].flatten().tolist()
        return self._latest[1]


class MixtureOrder:
    """Several orders mixed by share: each block of samples has every order's exact share, at random places.

    A sample is a pure function of its number here as well: how many samples of an order came before follows from the
    block's number and the block's own permutation. Indices count through the orders' data sets, one after another.
    """

    def __init__(self, orders: Sequence[SampleOrder], shares: Sequence[float], seed: int, name: str) -> None:
        """shares: one per order, not negative, with the sum 1; all but the first are rounded to thousandths."""
        self._orders, self._seed, self._name = list(orders), seed, name
        fractions = [Fraction(round(1000 * share), 1000) for share in shares[1:]]
        fractions = [1 - sum(fractions), *fractions]
        size = math.lcm(*(fraction.denominator for fraction in fractions))
        self._counts = [int(fraction * size) for fraction in fractions]
        self._members = np.repeat(np.arange(len(orders)), self._counts)
        self._index_offsets = np.cumsum([0, *(len(order) for order in orders)])
        self._shard_offsets = np.cumsum([0, *(order.shard_count for order in orders)])

    def take(self, start: int, stop: int) -> list[int]:
        """Return the indices of the samples start, start + 1, ..., stop - 1."""
        order = []
        for sample in range(start, stop):
            block, position = divmod(sample, len(self._members))
            members = self._members[permutation(len(self._members), "mixture", self._seed, self._name, block)]
            member = int(members[position])
            number = block * self._counts[member] + int((members[:position] == member).sum())
            order += [
                index + int(self._index_offsets[member]) for index in self._orders[member].take(number, number + 1)
            ]
        return order

    def shards_ahead(self, start: int) -> list[int]:
        """Return the shards that every order needs after its present ones."""
        block = start // len(self._members)
        return [
            shard + int(offset)
            for order, count, offset in zip(self._orders, self._counts, self._shard_offsets[:-1], strict=True)
            for shard in order.shards_ahead(block * count)
        ]
