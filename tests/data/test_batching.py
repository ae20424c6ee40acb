"""The order of an epoch: every sample, in one bucket at a time, equally on all ranks, resumable."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from library.data.batching import Pool, Row, count_micro_batches, epoch_plan, rank_rows
from library.sizes import Size

BUCKETS = [Size(64, 64), Size(32, 96), Size(96, 32)]
# From the first version; another order would make old training states resume differently.
GOLDEN_ORDER = [[[1], [0, 2]], [[10], [12, 11]]]


@st.composite
def pool_lists(draw, most_per_batch=4):
    """Up to three pools of a data set each, with images of up to three repeats, indices unique over all."""
    pools, index = [], 0
    for dataset, bucket in enumerate(BUCKETS[: draw(st.integers(1, 3))]):
        rows = []
        for _ in range(draw(st.integers(1, 7))):
            rows += [Row(index, repeat) for repeat in range(draw(st.integers(1, 3)))]
            index += 1
        pools.append(Pool(dataset, bucket, draw(st.integers(1, most_per_batch)), tuple(rows)))
    return pools


worlds = st.integers(1, 4)
accumulations = st.integers(1, 4)


@given(pool_lists(), worlds, accumulations, st.integers(0, 9))
def test_every_sample_is_served_once_an_epoch_over_all_ranks(pools, world, accumulation, epoch):
    plan = epoch_plan(pools, world=world, accumulation=accumulation, seed=1, epoch=epoch)
    served = Counter()
    for group in plan:
        for micro in group:
            for rank in range(world):
                part = rank_rows(micro, rank=rank, world=world)
                served.update(part.rows[: part.num_real])
    assert served == Counter(row for pool in pools for row in pool.rows)
    assert set(served.values()) == {1}


@given(pool_lists(), worlds, accumulations)
def test_a_micro_batch_has_one_bucket_and_fits_its_batch_size(pools, world, accumulation):
    home = {row: pool for pool in pools for row in pool.rows}
    for group in epoch_plan(pools, world=world, accumulation=accumulation, seed=2, epoch=0):
        for micro in group:
            assert {home[row].bucket for row in micro.rows} == {micro.bucket}
            assert 1 <= len(micro.rows) <= home[micro.rows[0]].batch_size * world


@given(pool_lists(), worlds)
def test_ranks_have_equally_many_rows_and_padding_copies_a_row_of_the_micro_batch(pools, world):
    for group in epoch_plan(pools, world=world, accumulation=1, seed=3, epoch=0):
        parts = [rank_rows(group[0], rank=rank, world=world) for rank in range(world)]
        assert len({len(part.rows) for part in parts}) == 1
        assert len(parts[0].rows) >= 1
        assert parts[0].num_real == len(parts[0].rows)
        for part in parts:
            assert set(part.rows[part.num_real :]) <= set(group[0].rows)


@given(pool_lists(most_per_batch=1), st.integers(1, 3), st.integers(2, 3), accumulations)
def test_ranks_times_batch_is_what_decides_the_samples_of_a_step(pools, batch, world, accumulation):
    def steps(ranks, per_rank):
        sized = [Pool(pool.dataset, pool.bucket, per_rank, pool.rows) for pool in pools]
        plan = epoch_plan(sized, world=ranks, accumulation=accumulation, seed=4, epoch=5)
        return [frozenset(row for micro in group for row in micro.rows) for group in plan]

    assert steps(world, batch) == steps(1, batch * world)


@given(pool_lists(), worlds, accumulations)
def test_the_number_of_steps_is_known_without_a_plan(pools, world, accumulation):
    plan = epoch_plan(pools, world=world, accumulation=accumulation, seed=5, epoch=0)
    widths = [pool.batch_size * world for pool in pools]
    assert -(-count_micro_batches([len(pool.rows) for pool in pools], widths) // accumulation) == len(plan)
    assert all(len(group) == accumulation for group in plan[:-1])
    assert 1 <= len(plan[-1]) <= accumulation


def test_epochs_and_seeds_differ_and_repeat_exactly():
    pools = [Pool(0, BUCKETS[0], 2, tuple(Row(i, 0) for i in range(20)))]

    def plan(seed, epoch):
        return epoch_plan(pools, world=1, accumulation=1, seed=seed, epoch=epoch)

    assert list(plan(1, 0)) == list(plan(1, 0))
    assert list(plan(1, 0)) != list(plan(1, 1))
    assert list(plan(1, 0)) != list(plan(2, 0))


def test_the_order_of_the_pools_does_not_matter():
    pools = [Pool(0, bucket, 2, tuple(Row(10 * n + i, 0) for i in range(5))) for n, bucket in enumerate(BUCKETS)]
    forward = epoch_plan(pools, world=1, accumulation=2, seed=1, epoch=0)
    assert list(forward) == list(epoch_plan(pools[::-1], world=1, accumulation=2, seed=1, epoch=0))


def test_the_order_of_a_seed_never_changes():
    pools = [Pool(0, bucket, 2, tuple(Row(10 * n + i, 0) for i in range(3))) for n, bucket in enumerate(BUCKETS[:2])]
    plan = epoch_plan(pools, world=1, accumulation=2, seed=1, epoch=0)
    assert [[[row.image for row in micro.rows] for micro in group] for group in plan] == GOLDEN_ORDER
