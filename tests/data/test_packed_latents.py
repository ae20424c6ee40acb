"""Latents in a packed cache: what is built, kept and noticed, and that batches are what they are without a cache."""

import os
import pickle

import pytest
import torch

from library.data.assemble import assemble
from library.data.batching import epoch_plan, rank_rows
from library.data.cache_places import CachePlace
from library.data.collate import BatchBuilder, Work
from library.data.dataset import build_train_data
from library.data.latent_caching import LatentCacheOptions, LatentPass, build_latents
from library.data.packed_entries import FACTS
from library.errors import UserError
from library.io.packed_maintenance import statistics
from library.io.packed_store import PackedStore
from library.sizes import Size
from tests.data.fakes import Counting, fake_vae
from tests.data.ranks import Ranks
from tests.data.specs import dataset, subset, write_folder, write_picture

NUM = 7


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "pictures")


@pytest.fixture
def build(tmp_path):
    """build(images, ...) runs a pass into the packed cache of the test."""

    def run(images, *, encode=None, vae_id="vae", rank=0, world=1, **options):
        place = CachePlace("packed", tmp_path / "cache")
        chosen = {"to_disk": True, "batch_size": 3, "place": place} | options
        return build_latents(
            images,
            encode or Counting(),
            options=LatentCacheOptions(vae_id, **chosen),
            rank=rank,
            world=world,
        )

    return run


def images_of(folder, *, subset_changes=None, **dataset_changes):
    return assemble([dataset(subset(folder, **(subset_changes or {})), **dataset_changes)])[0]


def figures(report):
    return report.built, report.reused, len(report.stale), len(report.failed)


def reasons(report):
    return [stale.reason for stale in report.stale]


def store_of(tmp_path):
    return PackedStore.open(tmp_path / "cache" / "latents", facts_dtype=FACTS)


def test_the_second_pass_reuses_everything_and_loads_no_encoder(folder, build, tmp_path):
    first, second = Counting(), Counting()
    store, report = build(images_of(folder), encode=first)
    assert figures(report) == (NUM, 0, 0, 0) and first.images == NUM
    again, report = build(images_of(folder), encode=second)
    assert figures(report) == (0, NUM, 0, 0) and second.loads == 0
    for row in range(NUM):
        assert torch.equal(store.get(row, flipped=False).latents_4hw, again.get(row, flipped=False).latents_4hw)
    assert not list(folder.glob("*.npz")) and (tmp_path / "cache" / "latents" / "index.sdxlidx").exists()


def test_an_interrupted_pass_goes_on_where_it_stopped(folder, build):
    with pytest.raises(KeyboardInterrupt):
        build(images_of(folder), encode=Counting(stop_after=3), batch_size=1)
    rest = Counting()
    assert figures(build(images_of(folder), encode=rest, batch_size=1)[1]) == (NUM - 3, 3, 0, 0)
    assert rest.images == NUM - 3


def test_one_changed_pixel_builds_that_entry_again(folder, build):
    build(images_of(folder))
    write_picture(folder / "p0.png", 64, 64, seed=99)
    encode = Counting()
    _, report = build(images_of(folder), encode=encode)
    assert figures(report) == (1, NUM - 1, 1, 0) and encode.images == 1
    assert reasons(report) == ["image changed"] and "p0.png" in report.stale[0].path
    # The same length, another content, another time: only the contents tell.
    data = bytearray((folder / "p1.png").read_bytes())
    data[-13] ^= 1
    (folder / "p1.png").write_bytes(data)
    os.utime(folder / "p1.png", ns=(1, 5))
    _, report = build(images_of(folder))
    assert len(report.stale) == 1 and reasons(report) == ["image changed"]


def test_touched_images_are_read_once_and_not_built_again(folder, build, monkeypatch):
    build(images_of(folder))
    for path in folder.glob("*.png"):
        os.utime(path, ns=(1, 1))
    assert figures(build(images_of(folder))[1]) == (0, NUM, 0, 0)
    monkeypatch.setattr("library.io.fingerprint.content_hash", lambda path: pytest.fail(f"{path} is read again"))
    assert figures(build(images_of(folder))[1]) == (0, NUM, 0, 0)


def test_a_note_of_a_touched_image_does_not_outlive_its_content(folder, build):
    build(images_of(folder))
    os.utime(folder / "p0.png", ns=(1, 1))
    build(images_of(folder))
    data = bytearray((folder / "p0.png").read_bytes())
    data[-13] ^= 1
    (folder / "p0.png").write_bytes(data)
    os.utime(folder / "p0.png", ns=(2, 2))
    assert reasons(build(images_of(folder))[1]) == ["image changed"]


def test_another_vae_replaces_entries_and_says_so(folder, build, tmp_path):
    build(images_of(folder))
    _, report = build(images_of(folder), vae_id="other")
    assert figures(report) == (NUM, 0, NUM, 0) and set(reasons(report)) == {"VAE changed"}
    assert figures(build(images_of(folder), vae_id="other")[1]) == (0, NUM, 0, 0)
    assert statistics(store_of(tmp_path)).superseded == NUM


def test_mirror_images_are_added_when_flip_aug_comes(folder, build):
    build(images_of(folder))
    store, report = build(images_of(folder, subset_changes={"flip_aug": True}))
    assert figures(report) == (NUM, 0, NUM, 0)
    assert set(reasons(report)) == {"no latents of the mirrored image"}
    plain, mirrored = (store.get(0, flipped=flip).latents_4hw for flip in (False, True))
    assert torch.allclose(plain.flip(-1).float(), mirrored.float(), atol=1e-3)
    assert figures(build(images_of(folder))[1]) == (0, NUM, 0, 0)


def test_resolutions_and_filters_lie_side_by_side(folder, build):
    small = {"enable_bucket": False}
    large = {"enable_bucket": False, "resolution": Size(96, 96)}
    boxed = {"enable_bucket": False, "subset_changes": {"resize_interpolation": "box"}}
    for changes in (small, large, boxed):
        assert figures(build(images_of(folder, **changes))[1]) == (NUM, 0, 0, 0)
    for changes in (small, large, boxed):
        store, report = build(images_of(folder, **changes))
        assert figures(report) == (0, NUM, 0, 0)
        side = changes.get("resolution", Size(64, 64)).w // 8
        assert store.get(0, flipped=False).latents_4hw.shape == (4, side, side)


def test_two_data_sets_at_two_resolutions_in_one_run(folder, build):
    specs = [dataset(subset(folder)), dataset(subset(folder), resolution=Size(96, 96), max_bucket_reso=192)]
    table, _ = assemble(specs)
    store, report = build(table)
    assert report.built == len({(row.record.path, row.placement) for row in table.used()})
    for row in range(len(table)):
        bucket = table.placement(row).bucket
        assert store.get(row, flipped=False).latents_4hw.shape == (4, bucket.h // 8, bucket.w // 8)
    assert build(assemble(specs)[0])[1].built == 0


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_the_work_and_all_have_everything(folder, build, monkeypatch, world):
    alone, _ = build_latents(images_of(folder), Counting(), options=LatentCacheOptions("vae", batch_size=1))
    ranks, encoders = Ranks(world, monkeypatch), [Counting() for _ in range(world)]
    results = ranks.run(
        lambda rank: build(images_of(folder), encode=encoders[rank], batch_size=1, rank=rank, world=world)
    )
    assert sum(encoder.images for encoder in encoders) == NUM and min(e.images for e in encoders) > 0
    for store, report in results:
        assert figures(report) == (NUM, 0, 0, 0)
        for row in range(NUM):
            expected = alone.get(row, flipped=False).latents_4hw.half()
            assert torch.equal(store.get(row, flipped=False).latents_4hw, expected)
    again = ranks.run(lambda rank: build(images_of(folder), rank=rank, world=world)[1])
    assert [figures(report) for report in again] == [(0, NUM, 0, 0)] * world


def test_ranks_share_the_reading_of_touched_images(folder, build, monkeypatch):
    build(images_of(folder))
    for path in folder.glob("*.png"):
        os.utime(path, ns=(1, 1))
    ranks = Ranks(2, monkeypatch)
    for _ in range(2):
        reports = ranks.run(lambda rank: build(images_of(folder), rank=rank, world=2)[1])
        assert [figures(report) for report in reports] == [(0, NUM, 0, 0)] * 2


def test_values_beyond_float16_are_kept(folder, build):
    def large(pixels, noise):
        latents, finite = fake_vae(pixels, noise)
        return latents * 1e6, finite

    store, _ = build(images_of(folder), encode=Counting(large))
    latents = store.get(0, flipped=False).latents_4hw
    assert latents.dtype == torch.float32 and latents.abs().max() > 65504 and latents.isfinite().all()


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_training_without_a_cache(folder, build, workers, monkeypatch):
    """In epochs 0 and 1, with mirrored images; the VAE stands in between, so encode the pixels of the other side."""
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    specs = [dataset(subset(folder, flip_aug=True, num_repeats=2))]
    cached = build_train_data(specs, seed=3, num_workers=workers)
    cached.attach_latents(build(cached.table)[0])
    plain = build_train_data(specs, seed=3)
    for epoch in (0, 1):
        for one, other in zip(cached.epoch(epoch), plain.epoch(epoch), strict=True):
            for left, right in zip(one.micro_batches, other.micro_batches, strict=True):
                assert left.keys == right.keys and torch.equal(left.sizes_B6, right.sizes_B6)
                expected, _ = fake_vae(right.pixels_B3HW, None)
                assert left.latents_B4hw.dtype == torch.float16
                assert torch.equal(left.latents_B4hw, expected.half())


def test_masks_are_cached_with_the_latents(folder, build, tmp_path):
    masks = tmp_path / "masks"
    for number, (width, height) in enumerate([(64, 64), (96, 40), (40, 96), (70, 64), (128, 100), (64, 64), (150, 60)]):
        write_picture(masks / f"p{number}.png", width, height, seed=100 + number)
    changes = {"subset_changes": {"flip_aug": True, "mask_dir": str(masks)}}
    images = images_of(folder, **changes)
    store, report = build(images)
    assert report.built == NUM
    memory, _ = build_latents(images, Counting(), options=LatentCacheOptions("vae"))
    for row in range(NUM):
        for flipped in (False, True):
            mask, expected = (each.get(row, flipped=flipped).mask_1hw for each in (store, memory))
            assert mask.dtype == torch.float32 and torch.allclose(mask, expected, atol=1e-3)
    assert build(images_of(folder, **changes))[1].built == 0
    write_picture(masks / "p3.png", 70, 64, seed=7)
    _, report = build(images_of(folder, **changes))
    assert figures(report) == (1, NUM - 1, 1, 0) and reasons(report) == ["mask changed"]
    # Without masks the entries are others, so nothing is replaced in turn.
    assert figures(build(images_of(folder, subset_changes={"flip_aug": True}))[1]) == (NUM, 0, 0, 0)
    assert build(images_of(folder, **changes))[1].built == 0


def test_stores_can_be_sent_to_other_processes(folder, build):
    store, _ = build(images_of(folder))
    copy = pickle.loads(pickle.dumps(store))
    assert torch.equal(copy.get(2, flipped=False).latents_4hw, store.get(2, flipped=False).latents_4hw)


def test_a_damaged_shard_costs_samples_and_not_the_run(folder, build, tmp_path):
    table = images_of(folder)
    store, _ = build(table)
    (shard,) = (tmp_path / "cache" / "latents").glob("*.sdxlpack")
    os.truncate(shard, shard.stat().st_size // 2)
    builder = BatchBuilder(table, seed=0, legacy_crop=False, latents=pickle.loads(pickle.dumps(store)))
    data = build_train_data([dataset(subset(folder))], seed=0)
    failures = []
    for (micro,) in epoch_plan(data.pools, world=1, accumulation=1, seed=0, epoch=0):
        failures += builder[Work(0, rank_rows(micro, rank=0, world=1))].failures
    assert 0 < len(failures) < NUM
    assert figures(build(images_of(folder))[1])[:2] == (len(failures), NUM - len(failures))


def test_trusted_entries_are_not_compared(folder, build):
    build(images_of(folder))
    write_picture(folder / "p0.png", 64, 64, seed=99)
    assert figures(build(images_of(folder), skip_check=True, vae_id="other")[1]) == (0, NUM, 0, 0)


def test_a_cache_folder_that_cannot_be_written_to_is_said_before_encoding(folder, build, tmp_path, monkeypatch):
    def refuse(dir):
        raise OSError(30, "Read-only file system")

    encode = Counting()
    monkeypatch.setattr("library.data.cache_places.tempfile.TemporaryFile", refuse)
    with pytest.raises(UserError, match="cannot be written"):
        build(images_of(folder), encode=encode)
    assert encode.loads == 0


def test_a_complete_cache_is_read_from_a_folder_that_cannot_be_written_to(folder, build, monkeypatch):
    build(images_of(folder))
    monkeypatch.setattr("library.data.packed_latents.require_writable", lambda folders: pytest.fail("asked"))
    assert figures(build(images_of(folder))[1]) == (0, NUM, 0, 0)


def test_another_run_with_another_vae_is_noticed(folder, build):
    def interfered():
        build(images_of(folder), vae_id="theirs")
        return fake_vae

    build(images_of(folder))
    write_picture(folder / "q.png", 64, 64, caption="q", seed=5)
    with pytest.raises(UserError, match="another run"):
        build(images_of(folder), encode=interfered)


def test_an_entry_that_another_run_made_is_seen(folder, tmp_path, build):
    table = images_of(folder)
    place = CachePlace("packed", tmp_path / "cache")
    work = LatentPass(table, LatentCacheOptions("vae", to_disk=True, place=place))
    assert {check.status for check in work.backend.look(rank=0, world=1)} == {"missing"}
    build(images_of(folder))
    assert [work.backend.look_again(number).status for number in range(NUM)] == ["valid"] * NUM
    os.utime(folder / "p0.png", ns=(1, 1))
    other = LatentPass(images_of(folder), LatentCacheOptions("vae", to_disk=True, place=place))
    assert other.backend.look_again(0).status == "valid"
    other = LatentPass(images_of(folder), LatentCacheOptions("theirs", to_disk=True, place=place))
    assert other.backend.look_again(0).reasons == ("VAE changed",)


def test_a_note_belongs_to_one_content(tmp_path, build):
    """A picture is touched, replaced by another of the same length, and put back with the time that was noted."""
    path = tmp_path / "pictures" / "p.bmp"

    def save(seed, time_ns):
        write_picture(path, 64, 64, seed=seed, caption="x")
        os.utime(path, ns=(time_ns, time_ns))
        return figures(build(images_of(path.parent))[1])

    assert save(1, 10) == (1, 0, 0, 0)
    assert save(1, 20) == (0, 1, 0, 0)  # noted
    assert save(2, 30) == (1, 0, 1, 0)
    assert save(1, 20) == (1, 0, 1, 0)
