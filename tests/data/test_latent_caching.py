"""Cached latents: what is built, what is kept, what is noticed, and what never depends on the batch."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from library.data.assemble import assemble
from library.data.caching import exchange
from library.data.latent_caching import LatentCacheOptions, build_latents, posterior_noise
from library.io import latent_cache
from library.sizes import Size
from tests.data.fakes import Counting, fake_vae
from tests.data.ranks import Ranks
from tests.data.specs import dataset, picture, subset, write_folder, write_picture

NUM = 7


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "pictures")


def images_of(folder, *, subset_changes=None, **dataset_changes):
    return assemble([dataset(subset(folder, **(subset_changes or {})), **dataset_changes)])[0]


def build(images, *, encode=None, vae_id="vae", batch_size=3, **options):
    options = LatentCacheOptions(vae_id, **({"to_disk": True, "batch_size": batch_size} | options))
    return build_latents(images, encode or Counting(), options=options)


def has(store, rows):
    """How many of the first rows a store has."""
    return int(store.has(np.arange(rows)).sum())


def figures(report):
    return report.built, report.reused, len(report.stale), len(report.failed)


def test_the_second_pass_reuses_everything_and_loads_no_encoder(folder):
    first = Counting()
    store, report = build(images_of(folder), encode=first)
    assert figures(report) == (NUM, 0, 0, 0)
    assert report.line() == "built 7, reused 0, stale 0, failed 0"
    assert first.images == NUM and first.loads == 1 and has(store, NUM) == NUM
    second = Counting()
    _, report = build(images_of(folder), encode=second)
    assert figures(report) == (0, NUM, 0, 0)
    assert second.loads == 0


def test_batches_hold_one_bucket_and_go_from_small_to_large(folder):
    shapes = []

    def encode(pixels, noise):
        shapes.append(tuple(pixels.shape))
        return fake_vae(pixels, noise)

    build(images_of(folder), encode=Counting(encode))
    areas = [h * w for _, _, h, w in shapes]
    assert areas == sorted(areas)
    assert max(shape[0] for shape in shapes) == 3 and sum(shape[0] for shape in shapes) == NUM


def test_an_interrupted_pass_goes_on_where_it_stopped(folder):
    with pytest.raises(KeyboardInterrupt):
        build(images_of(folder), encode=Counting(stop_after=3), batch_size=1)
    assert len(list(folder.glob("*.npz"))) == 3
    rest = Counting()
    _, report = build(images_of(folder), encode=rest, batch_size=1)
    assert figures(report) == (NUM - 3, 3, 0, 0)
    assert rest.images == NUM - 3


def test_an_edited_image_is_the_only_one_built_again(folder):
    build(images_of(folder))
    Image.fromarray(picture(64, 64, seed=99)).save(folder / "p0.png")
    encode = Counting()
    _, report = build(images_of(folder), encode=encode)
    assert figures(report) == (1, NUM - 1, 1, 0)
    assert report.stale[0].reason == "image changed" and "p0_" in report.stale[0].path
    assert encode.images == 1


def test_a_touched_or_copied_image_is_not_built_again(folder):
    build(images_of(folder))
    os.utime(folder / "p0.png", ns=(1, 1))
    assert figures(build(images_of(folder))[1]) == (0, NUM, 0, 0)


def test_another_resolution_vae_or_filter_makes_entries_stale(folder):
    build(images_of(folder, enable_bucket=False))
    _, report = build(images_of(folder, enable_bucket=False, resolution=Size(96, 96)))
    assert len(report.stale) == NUM and "bucket changed" in report.text("latents")
    _, report = build(images_of(folder, enable_bucket=False, resolution=Size(96, 96)), vae_id="other")
    assert {stale.reason for stale in report.stale} == {"VAE changed"}
    changed = images_of(
        folder, enable_bucket=False, resolution=Size(96, 96), subset_changes={"resize_interpolation": "box"}
    )
    _, report = build(changed, vae_id="other")
    assert {stale.reason for stale in report.stale} == {"resize interpolation changed"}


def test_flip_aug_added_later_adds_the_mirror_images(folder):
    build(images_of(folder))
    store, report = build(images_of(folder, subset_changes={"flip_aug": True}))
    assert figures(report) == (NUM, 0, NUM, 0)
    assert {stale.reason for stale in report.stale} == {"no latents of the mirrored image"}
    for row in range(NUM):
        plain, mirrored = (store.get(row, flipped=flip).latents_4hw for flip in (False, True))
        assert torch.allclose(plain.flip(-1), mirrored, atol=1e-6)
    _, report = build(images_of(folder))
    assert figures(report) == (0, NUM, 0, 0)


def test_a_broken_cache_file_is_built_again(folder):
    build(images_of(folder))
    victim = next(folder.glob("p3*.npz"))
    victim.write_bytes(victim.read_bytes()[:200])
    _, report = build(images_of(folder))
    assert figures(report) == (1, NUM - 1, 1, 0)
    assert report.stale[0].reason.startswith("unreadable")
    latent_cache.read(victim)


def test_skipping_the_check_trusts_what_is_there(folder):
    build(images_of(folder))
    Image.fromarray(picture(64, 64, seed=99)).save(folder / "p0.png")
    next(folder.glob("p3*.npz")).unlink()
    _, report = build(images_of(folder), skip_check=True)
    assert figures(report) == (1, NUM - 1, 0, 0)


def test_files_of_sd_scripts_are_used_when_their_shape_fits(folder):
    images = images_of(folder)
    for number, image in enumerate(images):
        bucket = image.placement.bucket
        h, w = (bucket.h // 8, bucket.w // 8) if number else (4, 4)
        np.savez(
            latent_cache.latent_cache_path(image.record.path, image.record.size),
            latents=np.full((4, h, w), number, dtype=np.float32),
            original_size=np.array(image.record.size),
            crop_ltrb=np.array([1.0, 2.0, 3.0, 4.0]),
        )
    store, report = build(images)
    assert figures(report) == (1, NUM - 1, 1, 0)
    assert store.get(3, flipped=False).latents_4hw.unique().tolist() == [3.0]


def test_sd_scripts_finds_what_it_expects_in_our_files(folder):
    images = images_of(folder, subset_changes={"flip_aug": True})
    build(images)
    image = next(image for image in images if image.record.size == (96, 40))
    with np.load(folder / "p1_0096x0040_sdxl.npz", allow_pickle=False) as file:
        bucket = image.placement.bucket
        assert file["latents"].shape == file["latents_flipped"].shape == (4, bucket.h // 8, bucket.w // 8)
        assert file["latents"].dtype == np.float32
        assert file["original_size"].tolist() == [96, 40]
        assert file["crop_ltrb"].dtype == np.float64 and file["crop_ltrb"].shape == (4,)


def test_an_image_that_cannot_be_decoded_is_left_out_and_named(folder):
    images = images_of(folder)
    (folder / "p2.png").write_bytes((folder / "p2.png").read_bytes()[:200])
    store, report = build(images)
    assert figures(report) == (NUM - 1, 0, 0, 1)
    assert report.failed[0].path.endswith("p2.png")
    assert has(store, 3) == 2 and has(store, NUM) == NUM - 1


def test_an_image_without_finite_latents_is_left_out_and_named(folder):
    def encode(pixels, noise):
        latents, finite = fake_vae(pixels, noise)
        finite[0] = pixels.shape[-1] != 96
        return latents, finite

    images = images_of(folder)
    store, report = build(images, encode=Counting(encode))
    assert figures(report) == (NUM - 1, 0, 0, 1)
    assert "finite" in report.failed[0].reason
    assert len(list(folder.glob("*.npz"))) == NUM - 1 == has(store, NUM)


def test_a_mirror_image_without_finite_latents_counts_too(folder):
    calls = []

    def encode(pixels, noise):
        calls.append(noise)
        latents, finite = fake_vae(pixels, noise)
        finite[:] = len(calls) != 2  # the mirror image of the first batch
        return latents, finite

    images = images_of(folder, subset_changes={"flip_aug": True})
    _, report = build(images, encode=Counting(encode), batch_size=1)
    assert figures(report) == (NUM - 1, 0, 0, 1)
    # An image and its mirror image are two draws.
    assert calls[0].shape == calls[1].shape and not torch.equal(calls[0], calls[1])


@pytest.mark.parametrize("to_disk", [False, True])
def test_latents_do_not_depend_on_the_batch(tmp_path, to_disk):
    def encode(pixels, noise):
        return fake_vae(pixels, noise)[0] + noise, torch.ones(len(pixels), dtype=torch.bool)

    stores = []
    for batch_size in (1, 4):
        folder = write_folder(tmp_path / str(batch_size) / "pictures")
        images = images_of(folder, subset_changes={"flip_aug": True})
        stores.append(build(images, encode=Counting(encode), batch_size=batch_size, to_disk=to_disk)[0])
    for row in range(NUM):
        for flip in (False, True):
            one, two = (store.get(row, flipped=flip).latents_4hw for store in stores)
            assert torch.equal(one, two)


def test_the_posterior_noise_is_normal_and_of_each_image_its_own(folder):
    images = images_of(folder, enable_bucket=False)
    noise = posterior_noise(images, "plain")
    assert noise.shape == (NUM, 4, 8, 8)
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05
    assert torch.equal(noise[2:3], posterior_noise(images[2:3], "plain"))
    assert not torch.equal(noise[0], noise[1])
    assert not torch.equal(noise, posterior_noise(images, "flipped"))


def test_memory_leaves_no_file(folder):
    store, report = build(images_of(folder), to_disk=False)
    assert figures(report) == (NUM, 0, 0, 0) and store.in_memory
    assert list(folder.glob("*.npz")) == []


def test_images_that_share_a_name_do_not_overwrite_each_other(tmp_path):
    folder = tmp_path / "pictures"
    write_picture(folder / "a.png", 64, 64, caption="x", seed=1)
    write_picture(folder / "a.bmp", 64, 64, seed=2)
    small, large = dataset(subset(folder)), dataset(subset(folder), resolution=Size(96, 96))
    images, _ = assemble([small, large])
    store, report = build(images)
    assert figures(report) == (4, 0, 0, 0)
    assert len(list(folder.glob("a_0064x0064_sdxl*.npz"))) == 4
    assert len({store.get(row, flipped=False).latents_4hw.sum().item() for row in range(4)}) == 4
    images, _ = assemble([small, large])
    assert figures(build(images)[1]) == (0, 4, 0, 0)


def test_an_image_used_twice_in_the_same_way_is_encoded_once(folder):
    images, _ = assemble([dataset(subset(folder)), dataset(subset(folder, flip_aug=True))])
    encode = Counting()
    store, report = build(images, encode=encode)
    assert figures(report) == (NUM, 0, 0, 0)
    assert encode.images == 2 * NUM  # each with its mirror image
    assert has(store, 2 * NUM) == 2 * NUM
    store.get(2 * NUM - 1, flipped=True)


@pytest.mark.parametrize("to_disk", [False, True])
def test_two_ranks_share_the_work_and_both_have_everything(folder, to_disk, monkeypatch):
    (folder / "p2.png").write_bytes((folder / "p2.png").read_bytes()[:200])
    encoders = [Counting(), Counting()]
    options = LatentCacheOptions("v", to_disk=to_disk, batch_size=2)

    def work(rank):
        return build_latents(images_of(folder), encoders[rank], options=options, rank=rank, world=2)

    images = images_of(folder)
    alone, _ = build_latents(images, Counting(), options=LatentCacheOptions("v", batch_size=2))
    (store_0, report_0), (store_1, report_1) = Ranks(2, monkeypatch).run(work)
    assert all(encode.images > 0 for encode in encoders) and sum(encode.images for encode in encoders) == NUM - 1
    assert report_0 == report_1 and figures(report_0) == (NUM - 1, 0, 0, 1)
    for row in (row for row in range(NUM) if not images[row].record.path.endswith("p2.png")):
        one, two = (store.get(row, flipped=False).latents_4hw for store in (store_0, store_1))
        assert torch.equal(one, two) and torch.equal(one, alone.get(row, flipped=False).latents_4hw)


def test_one_process_has_nothing_to_exchange():
    assert exchange("alone") == ["alone"]
