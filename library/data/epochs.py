"""Which samples an epoch has, in which buckets.

With one resolution every epoch has the same: each image in its bucket, once per repeat. With several, each visit of an
image (one of its repeats) takes place at one of them. The draw depends on (run seed, epoch, record key, repeat) and on
nothing else, like every other draw of a sample, but is made for all visits at once: a hash of the four, mixed in
whole-array arithmetic, chooses the resolution. So pools, and the number of steps, differ from epoch to epoch.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from library.config.dataset_file import DatasetSpec
from library.data.batching import Pool, Rows, count_micro_batches
from library.data.table import ImageTable, text_id
from library.seeds import derive_seed


def row_shares(table: ImageTable, specs: Sequence[DatasetSpec]) -> np.ndarray:
    """For every row the share of its image's visits that take place there, float64 (N,); 1 for an image's only row."""
    widest = max((len(spec.weights) for spec in specs), default=1)
    weights = np.ones((len(specs), widest))
    for number, spec in enumerate(specs):
        weights[number, : len(spec.weights)] = spec.weights
    of_row = weights[table.dataset_of, table.resolution_of]
    return of_row / np.bincount(table.image_of, weights=of_row, minlength=table.num_images)[table.image_of]


class EpochPools:
    """The pools of every epoch, in ascending order of (data set, bucket).

    Speaks of the images that are in use when it is made; make it again after `ImageTable.drop`.
    """

    def __init__(self, table: ImageTable, specs: Sequence[DatasetSpec], *, seed: int) -> None:
        self._table, self._specs, self._seed = table, specs, seed
        self._rows = table.rows
        self._repeats = table.repeats[table.image_of[self._rows]]
        self._buckets = sorted({placement.bucket for placement in table.placements})
        number_of = {bucket: number for number, bucket in enumerate(self._buckets)}
        bucket_of = np.array([number_of[placement.bucket] for placement in table.placements], dtype=np.int64)
        pools = table.dataset_of[self._rows] * len(self._buckets) + bucket_of[table.placement_of[self._rows]]
        self._codes, self._pool_of = np.unique(pools, return_inverse=True)
        # The position in `_rows` of the first row of every image, and how many rows it has.
        images = table.image_of[self._rows]
        self._first = np.flatnonzero(np.diff(images, prepend=-1))
        self._offers = np.diff(self._first, append=len(images))
        self._micro_batches: dict[tuple[int, int], int] = {}

    @property
    def are_equal(self) -> bool:
        """Whether all epochs have the same pools, since no image is offered at several resolutions."""
        return len(self._first) == len(self._rows)

    @cached_property
    def offered(self) -> list[Pool]:
        """Every image wherever it may turn up, once per repeat; with one resolution this is any epoch."""
        return self._grouped(*_repeated(np.arange(len(self._rows)), self._repeats))

    def pools(self, epoch: int) -> list[Pool]:
        """The pools of one epoch (from 0); every visit of an image is in one of them."""
        return self.offered if self.are_equal else self._grouped(*self._draw(epoch))

    def micro_batches(self, epoch: int, *, world: int) -> int:
        """How many micro-batches of `world` ranks an epoch has, without making its pools."""
        epoch = 0 if self.are_equal else epoch
        if (epoch, world) not in self._micro_batches:
            if self.are_equal:
                sizes = np.bincount(self._pool_of, weights=self._repeats, minlength=len(self._codes))
            else:
                sizes = np.bincount(self._pool_of[self._draw(epoch)[0]], minlength=len(self._codes))
            widths = [self._specs[code // len(self._buckets)].batch_size * world for code in self._codes.tolist()]
            self._micro_batches[epoch, world] = count_micro_batches(sizes.astype(np.int64).tolist(), widths)
        return self._micro_batches[epoch, world]

    def _grouped(self, positions: np.ndarray, repeats: np.ndarray) -> list[Pool]:
        """Pools of visits, given by position in `_rows`; each pool keeps their order."""
        pool_of = self._pool_of[positions]
        order = np.argsort(pool_of, kind="stable")
        ends = np.cumsum(np.bincount(pool_of, minlength=len(self._codes)))[:-1]
        pools = []
        for code, members in zip(self._codes.tolist(), np.split(order, ends), strict=True):
            if len(members):
                dataset, bucket = divmod(code, len(self._buckets))
                rows = Rows(self._rows[positions[members]], repeats[members])
                pools.append(Pool(dataset, self._buckets[bucket], self._specs[dataset].batch_size, rows))
        return pools

    def _draw(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The position in `_rows` and the repeat of every visit, image by image."""
        images, repeats = _repeated(np.arange(len(self._first)), self._repeats[self._first])
        seed = np.uint64(derive_seed(self._seed, "resolution", epoch))
        number = _uniform(self._key_ids[images] ^ seed, repeats.astype(np.uint64))
        positions = self._first[images]
        for limit in self._limits:
            positions += number >= limit[images]
        return positions, repeats

    @cached_property
    def _key_ids(self) -> np.ndarray:
        """64 bits for the key of every used image."""
        images = self._table.image_of[self._rows[self._first]]
        return np.array([text_id(self._table.keys.text(image)) for image in images.tolist()], dtype=np.uint64)

    @cached_property
    def _limits(self) -> list[np.ndarray]:
        """For every offer but the last, by image: the sum of the shares up to it; 1 where there is no offer after it.

        A number in [0, 1) belongs to the offer that comes after as many limits as it reaches.
        """
        shares = row_shares(self._table, self._specs)[self._rows]
        total = np.zeros(len(self._first))
        limits = []
        for offer in range(int(self._offers.max(initial=1)) - 1):
            is_there = offer < self._offers - 1
            total = total + np.where(is_there, shares[np.minimum(self._first + offer, len(shares) - 1)], 0.0)
            limits.append(np.where(is_there, total, 1.0))
        return limits


def _repeated(numbers: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each number `counts` times, and beside it which of its repeats this is, from 0."""
    ends = np.cumsum(counts)
    which = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - counts, counts)
    return np.repeat(numbers, counts), which


def _uniform(ids: np.ndarray, repeats: np.ndarray) -> np.ndarray:
    """A number in [0, 1) for each pair, float64: two rounds of the SplitMix64 finaliser (Steele et al., 2014)."""
    mixed = _mix(_mix(ids) + repeats * np.uint64(0x9E3779B97F4A7C15))
    return (mixed >> np.uint64(11)) * 2.0**-53


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
