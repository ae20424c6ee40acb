"""The order of an epoch: which samples make up each optimizer step, on which rank.

A pure function of (seed, epoch, bucket contents, global batch size). Two ranks with batch b see in every step the
same samples as one rank with batch 2b, and a run that resumes at step k sees the tail of the same plan.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from library.seeds import derive_seed
from library.sizes import Size


class Row(NamedTuple):
    """One visit of one image: its index in the data and which of its repeats this is."""

    image: int
    repeat: int


@dataclass(frozen=True, slots=True)
class Pool:
    """Everything that may share a batch: one bucket of one data set. `batch_size` is per rank."""

    dataset: int
    bucket: Size
    batch_size: int
    rows: tuple[Row, ...]


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


def epoch_plan(
    pools: Sequence[Pool], *, world: int, accumulation: int, seed: int, epoch: int
) -> list[tuple[MicroBatch, ...]]:
    """The optimizer steps of one epoch, each a group of up to `accumulation` micro-batches.

    Within a pool the rows are shuffled and cut into micro-batches of `batch_size * world` (the last one may be
    smaller); the micro-batches of all pools are shuffled and grouped; the last group may be shorter.
    """
    rng = random.Random(derive_seed(seed, "order", epoch))
    micro_batches = []
    for pool in sorted(pools, key=lambda pool: (pool.dataset, pool.bucket)):
        rows = list(pool.rows)
        rng.shuffle(rows)
        width = pool.batch_size * world
        for start in range(0, len(rows), width):
            micro_batches.append(MicroBatch(pool.dataset, pool.bucket, tuple(rows[start : start + width])))
    rng.shuffle(micro_batches)
    return [tuple(micro_batches[i : i + accumulation]) for i in range(0, len(micro_batches), accumulation)]


def count_steps(pools: Sequence[Pool], *, world: int, accumulation: int) -> int:
    """The number of optimizer steps of an epoch, without making the plan."""
    micro_batches = sum(-(-len(pool.rows) // (pool.batch_size * world)) for pool in pools)
    return -(-micro_batches // accumulation)


def rank_rows(micro_batch: MicroBatch, *, rank: int, world: int) -> RankRows:
    """Every `world`-th row from `rank` on, padded so that all ranks have the same number of rows, at least one."""
    rows = micro_batch.rows[rank::world]
    height = -(-len(micro_batch.rows) // world)
    filler = rows[0] if rows else micro_batch.rows[0]
    return RankRows(micro_batch.bucket, rows + (filler,) * (height - len(rows)), num_real=len(rows))
