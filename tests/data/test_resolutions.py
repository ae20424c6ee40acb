"""Several resolutions in one run: where each visit takes place, and which files hold the latents."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from library.data.buckets import Placement
from library.data.dataset import build_train_data
from library.data.epochs import EpochPools, row_shares
from library.data.latent_caching import LatentCacheOptions, build_latents
from library.data.records import ImageRecord, PlacedImage, Skipped
from library.data.table import ImageTable
from library.sizes import Size
from tests.data.fakes import Counting, fake_vae
from tests.data.ranks import Ranks
from tests.data.specs import dataset, subset, write_folder, write_picture

SIZES = (Size(64, 64), Size(96, 96), Size(128, 128))
NUM = 7


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "pictures")


def several(folder, *resolutions, weights=(), subset_changes=None, **changes):
    return dataset(
        subset(folder, **(subset_changes or {})),
        **{"resolution": resolutions[0], "other_resolutions": resolutions[1:], "resolution_weights": weights} | changes,
    )


def data_of(spec, **settings):
    return build_train_data([spec], **({"seed": 7} | settings))


def visits(data, epoch):
    """(record, repeat) -> bucket area, of every sample of an epoch."""
    found = [
        ((key.record, key.repeat), batch.bucket.area)
        for group in data.epoch(epoch)
        for batch in group.micro_batches
        for key in batch.keys[: batch.num_real]
    ]
    assert len(dict(found)) == len(found), "a visit took place twice"
    return dict(found)


def synthetic(images, *, repeats=1, resolutions=3):
    """A table of records that no file stands behind; each image is placed at every resolution."""
    one = subset("x")
    placements = [Placement(size, size, 0.0) for size in SIZES[:resolutions]]
    return ImageTable(
        PlacedImage(record, placement, 0, number)
        for record in (
            ImageRecord(f"x/{image}", f"/x/{image}", Size(128, 128), "", one, repeats) for image in range(images)
        )
        for number, placement in enumerate(placements)
    )


def test_every_visit_takes_place_once_an_epoch(folder):
    data = data_of(several(folder, *SIZES[:2], subset_changes={"num_repeats": 3}))
    expected = {(record.key, repeat) for record in data.records for repeat in range(3)}
    epochs = [visits(data, epoch) for epoch in range(4)]
    assert all(set(epoch) == expected for epoch in epochs)
    assert len({tuple(sorted(epoch.items())) for epoch in epochs}) == 4, "every epoch draws anew"
    assert visits(data, 2) == epochs[2]


@pytest.mark.parametrize("weights", [(), (1.0, 1.0, 2.0), (1.0, 9.0, 0.5)])
def test_visits_follow_the_weights(weights):
    spec = several("x", *SIZES, weights=weights)
    pools = EpochPools(synthetic(4000, repeats=2), [spec], seed=3)
    shares = np.array(spec.weights) / sum(spec.weights)
    for epoch in range(3):
        counts = [len(pool.rows) for pool in pools.pools(epoch)]
        assert sum(counts) == 8000
        # 4.5 standard deviations: one run in 100,000 would fail, and this one has a fixed seed
        assert np.all(np.abs(counts - 8000 * shares) < 4.5 * np.sqrt(8000 * shares * (1 - shares)))


def test_the_two_repeats_of_an_image_and_two_epochs_are_drawn_apart():
    pools = EpochPools(synthetic(4000, repeats=2, resolutions=2), [several("x", *SIZES[:2])], seed=3)
    places = [{tuple(row): pool.bucket for pool in pools.pools(epoch) for row in pool.rows} for epoch in (0, 1)]
    by_visit = [{(row // 2, repeat): bucket for (row, repeat), bucket in epoch.items()} for epoch in places]
    same_repeats = np.mean([by_visit[0][image, 0] == by_visit[0][image, 1] for image in range(4000)])
    same_epochs = np.mean([by_visit[0][visit] == by_visit[1][visit] for visit in by_visit[0]])
    assert abs(same_repeats - 0.5) < 0.04 and abs(same_epochs - 0.5) < 0.03


def test_leaving_an_image_out_moves_no_other(folder):
    whole = data_of(several(folder, *SIZES[:2]))
    before = visits(whole, 1)
    gone = whole.records[2]
    whole.drop([Skipped(gone.path, "unreadable")])
    assert visits(whole, 1) == {visit: area for visit, area in before.items() if visit[0] != gone.key}


@settings(deadline=None, max_examples=25)
@given(
    weights=st.lists(st.sampled_from([1.0, 2.0, 0.25]), min_size=1, max_size=3),
    repeats=st.integers(1, 3),
    batch=st.integers(1, 4),
    world=st.integers(1, 2),
    epoch=st.integers(0, 50),
)
def test_steps_are_those_of_the_plan(weights, repeats, batch, world, epoch):
    from library.data.batching import epoch_plan

    spec = several("x", *SIZES[: len(weights)], weights=tuple(weights), batch_size=batch)
    pools = EpochPools(synthetic(17, repeats=repeats, resolutions=len(weights)), [spec], seed=5)
    plan = epoch_plan(pools.pools(epoch), world=world, accumulation=1, seed=5, epoch=epoch)
    assert pools.micro_batches(epoch, world=world) == len(plan)
    assert sum(len(micro.rows) for step in plan for micro in step) == 17 * repeats


def test_the_steps_before_an_epoch_are_the_sum_of_those_before(folder):
    data = data_of(several(folder, *SIZES[:2], subset_changes={"num_repeats": 2}), accumulation=2)
    lengths = [data.steps_in(epoch) for epoch in range(30)]
    assert len(set(lengths)) > 1 and not data.epochs_are_equal
    assert [data.steps_before(epoch) for epoch in range(31)] == [sum(lengths[:epoch]) for epoch in range(31)]
    single = data_of(several(folder, SIZES[0]), accumulation=2)
    assert single.epochs_are_equal and single.steps_before(9) == 9 * single.steps_in(4)


def test_an_image_without_a_place_at_one_resolution_keeps_the_others(tmp_path):
    write_picture(tmp_path / "a" / "strip.png", 512, 32)
    data = data_of(several(tmp_path / "a", Size(64, 64), Size(128, 128), bucket_no_upscale=True))
    assert [image.resolution for image in data.table] == [1] and data.epochs_are_equal
    assert row_shares(data.table, data.specs).tolist() == [1.0]
    nowhere = several(tmp_path / "a", Size(32, 32), Size(64, 64), bucket_no_upscale=True)
    write_picture(tmp_path / "a" / "square.png", 64, 64)
    assert [skipped.path for skipped in data_of(nowhere).scan_report.skipped] == [str(tmp_path / "a" / "strip.png")]


def test_the_summary_counts_what_an_epoch_has_on_average(folder):
    spec = several(folder, Size(64, 64), Size(128, 128), weights=(1.0, 3.0), enable_bucket=False)
    data = data_of(replace_repeats(spec, 4))
    summary = data.summary()
    assert summary.images == NUM and summary.repeats == 4 * NUM
    assert summary.buckets == {Size(64, 64): NUM, Size(128, 128): 3 * NUM}
    assert "resolution (128, 128), on average, count: 21" in summary.text()
    assert [fit.title for fit in summary.fits] == ["at 64x64", "at 128x128"]
    metadata = data.ss_metadata(user_config=False)
    assert metadata["ss_resolution"] == "(64, 64)" and metadata["ss_num_train_images"] == "28"


def replace_repeats(spec, repeats):
    from dataclasses import replace

    return replace(spec, subsets=tuple(replace(each, num_repeats=repeats) for each in spec.subsets))


# --- cache files ------------------------------------------------------------------------------------------------------


def build(spec, *, encode=None, rank=0, world=1):
    data = data_of(spec)
    options = LatentCacheOptions("vae", to_disk=True, batch_size=3)
    store, report = build_latents(data.table, encode or Counting(), options=options, rank=rank, world=world)
    return data, store, (report.built, report.reused, len(report.stale), len(report.failed))


def test_caches_of_two_resolutions_lie_side_by_side(folder):
    both = several(folder, Size(64, 64), Size(128, 128), enable_bucket=False)
    data, store, figures = build(both)
    assert figures == (2 * NUM, 0, 0, 0)
    for row in data.table.rows.tolist():
        bucket = data.table.placement(row).bucket
        assert store.get(row, flipped=False).latents_4hw.shape == (4, bucket.h // 8, bucket.w // 8)
    assert len(list(folder.glob("*_sdxl.npz"))) == len(list(folder.glob("*_sdxl_????????.npz"))) == NUM
    with np.load(folder / "p0_0064x0064_sdxl.npz") as standard:
        assert standard["latents"].shape == (4, 8, 8), "the first resolution has the standard name"
    untouched = {path: path.stat().st_mtime_ns for path in folder.glob("*.npz")}
    for resolutions in (SIZES[:1], SIZES[2:], (SIZES[2], SIZES[0]), (SIZES[0], SIZES[2])):
        count = len(resolutions) * NUM
        assert build(several(folder, *resolutions, enable_bucket=False))[2] == (0, count, 0, 0), resolutions
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*.npz")} == untouched


def test_a_cache_of_the_second_resolution_is_used_and_kept(folder):
    assert build(several(folder, SIZES[2], enable_bucket=False))[2] == (NUM, 0, 0, 0)
    both = several(folder, SIZES[0], SIZES[2], enable_bucket=False)
    assert build(both)[2] == (NUM, NUM, 0, 0)
    assert build(both)[2] == (0, 2 * NUM, 0, 0)
    third = several(folder, *SIZES, enable_bucket=False)
    assert build(third)[2] == (NUM, 2 * NUM, 0, 0)
    write_picture(folder / "p0.png", 64, 64, seed=50)
    assert build(third)[2][:2] == (3, 3 * NUM - 3)
    assert build(third)[2] == (0, 3 * NUM, 0, 0)
    assert len(list(folder.glob("p0*.npz"))) == 3, "an entry is built again where it was"


def test_a_moved_folder_keeps_its_entries(folder, tmp_path):
    both = several(folder, SIZES[0], SIZES[2], enable_bucket=False)
    build(both)
    moved = tmp_path / "elsewhere"
    folder.rename(moved)
    assert build(several(moved, SIZES[0], SIZES[2], enable_bucket=False))[2] == (0, 2 * NUM, 0, 0)


def test_two_ranks_choose_the_same_files(folder, monkeypatch):
    both = several(folder, SIZES[0], SIZES[2])
    ranks = Ranks(2, monkeypatch)
    for expected in ((2 * NUM, 0, 0, 0), (0, 2 * NUM, 0, 0)):
        done = ranks.run(lambda rank: build(both, rank=rank, world=2))
        assert [figures for _, _, figures in done] == [expected] * 2


def test_cached_equals_uncached_at_every_resolution(folder):
    spec = several(folder, SIZES[0], SIZES[2])
    _, store, _ = build(spec)
    fresh, cached = data_of(spec), data_of(spec)
    cached.attach_latents(store)
    seen = Counter()
    for plain, latent in zip(fresh.epoch(0), cached.epoch(0), strict=True):
        for one, two in zip(plain.micro_batches, latent.micro_batches, strict=True):
            assert one.keys == two.keys and torch.equal(one.sizes_B6, two.sizes_B6)
            expected, _ = fake_vae(one.pixels_B3HW, torch.zeros(len(one.keys), 4, 1, 1))
            assert torch.allclose(two.latents_B4hw, expected, atol=1e-6)
            seen[one.bucket.area > 64 * 64] += len(one.keys)
    assert all(seen[is_large] for is_large in (True, False))
