"""The order of an epoch: which samples make up each optimizer step, on which rank.

A pure function of (seed, epoch, bucket contents, global batch size). Two ranks with batch b see in every step the
same samples as one rank with batch 2b, and a run that resumes at step k sees the tail of the same plan.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, overload

import numpy as np

from library.seeds import derive_seed
from library.sizes import Size


class Row(NamedTuple):
    """One visit of one image: its row in the table of images and which of its repeats this is."""

    image: int
    repeat: int


class Rows(Sequence[Row]):
    """Visits held in two int64 columns."""

    def __init__(self, images: np.ndarray, repeats: np.ndarray) -> None:
        self._images, self._repeats = images, repeats

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Row, ...]: ...
    def __getitem__(self, index: int | slice) -> Row | tuple[Row, ...]:
        if isinstance(index, slice):
            pairs = zip(self._images[index].tolist(), self._repeats[index].tolist(), strict=True)
            return tuple(Row(*pair) for pair in pairs)
        return Row(int(self._images[index]), int(self._repeats[index]))

    def __len__(self) -> int:
        return len(self._images)


@dataclass(frozen=True, slots=True)
class Pool:
    """Everything that may share a batch: one bucket of one data set. `batch_size` is per rank."""

    dataset: int
    bucket: Size
    batch_size: int
    rows: Sequence[Row]


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """The samples of one forward pass over all ranks, all of one bucket."""

    dataset: int
    bucket: Size
    rows: tuple[Row, ...]


@dataclass(frozen=True, slots=True)
class RankRows:
    """One rank's part of a micro-batch: the first `num_real` rows are samples, the rest is padding."""

    bucket: Size
    rows: tuple[Row, ...]
    num_real: int


class EpochPlan(Sequence[tuple[MicroBatch, ...]]):
    """The optimizer steps of one epoch, each a group of up to `accumulation` micro-batches, made when asked for."""

    def __init__(
        self,
        pools: Sequence[Pool],
        orders: Sequence[np.ndarray],
        cuts: Sequence[tuple[int, int, int]],
        *,
        accumulation: int,
    ) -> None:
        self._pools, self._orders, self._cuts = pools, orders, cuts
        self._accumulation = accumulation
        sizes = [min(stop, len(orders[number])) - start for number, start, stop in cuts]
        self._ends = np.cumsum(np.array([0, *sizes], dtype=np.int64))

    def samples_before(self, step: int) -> int:
        """How many samples the steps before `step` hold, over all ranks."""
        return int(self._ends[min(step * self._accumulation, len(self._cuts))])

    def _micro_batch(self, cut: tuple[int, int, int]) -> MicroBatch:
        number, start, stop = cut
        pool = self._pools[number]
        rows = tuple(pool.rows[index] for index in self._orders[number][start:stop].tolist())
        return MicroBatch(pool.dataset, pool.bucket, rows)

    @overload
    def __getitem__(self, index: int) -> tuple[MicroBatch, ...]: ...
    @overload
    def __getitem__(self, index: slice) -> list[tuple[MicroBatch, ...]]: ...
    def __getitem__(self, index: int | slice) -> tuple[MicroBatch, ...] | list[tuple[MicroBatch, ...]]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        start = range(len(self))[index] * self._accumulation
        return tuple(map(self._micro_batch, self._cuts[start : start + self._accumulation]))

    def __len__(self) -> int:
        return -(-len(self._cuts) // self._accumulation)


def epoch_plan(pools: Sequence[Pool], *, world: int, accumulation: int, seed: int, epoch: int) -> EpochPlan:
    """The order of one epoch.

    Within a pool the rows are shuffled and cut into micro-batches of `batch_size * world` (the last one may be
    smaller); the micro-batches of all pools are shuffled and grouped; the last group may be shorter.
    """
    rng = random.Random(derive_seed(seed, "order", epoch))
    pools = sorted(pools, key=lambda pool: (pool.dataset, pool.bucket))
    orders: list[np.ndarray] = []
    cuts: list[tuple[int, int, int]] = []
    for number, pool in enumerate(pools):
        order = list(range(len(pool.rows)))
        rng.shuffle(order)
        orders.append(np.array(order, dtype=np.int64))
        width = pool.batch_size * world
        cuts += [(number, start, start + width) for start in range(0, len(order), width)]
    rng.shuffle(cuts)
    return EpochPlan(pools, orders, cuts, accumulation=accumulation)


def count_micro_batches(sizes: Iterable[int], widths: Iterable[int]) -> int:
    """The number of micro-batches of an epoch, without making the plan; `widths` are batch sizes over all ranks."""
    return sum(-(-size // width) for size, width in zip(sizes, widths, strict=True))


def rank_rows(micro_batch: MicroBatch, *, rank: int, world: int) -> RankRows:
    """Every `world`-th row from `rank` on, padded so that all ranks have the same number of rows, at least one."""
    rows = micro_batch.rows[rank::world]
    height = -(-len(micro_batch.rows) // world)
    filler = rows[0] if rows else micro_batch.rows[0]
    return RankRows(micro_batch.bucket, rows + (filler,) * (height - len(rows)), num_real=len(rows))
