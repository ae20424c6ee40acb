"""Masks and condition images: which file belongs to which image, and that they are cut exactly as the image is."""

import os
import random
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from library.data import file_facts
from library.data.assemble import assemble
from library.data.buckets import BucketPolicy, Placement
from library.data.companions import has_aspect_of
from library.data.dataset import build_train_data
from library.data.latent_caching import LatentCacheOptions, build_latents
from library.data.pixels import cut_control, cut_mask
from library.diffusion.masks import mask_cells
from library.io import latent_cache
from library.sizes import Size
from tests.data.fakes import Counting
from tests.data.samples import load_sample
from tests.data.specs import SIZES, dataset, picture, subset, write_folder, write_picture

NUM = len(SIZES)
SOFT_FILTERS = ("nearest", "bilinear", "linear", "area", "box")


@pytest.fixture
def folder(tmp_path):
    """Pictures with alpha, and the masks and condition images of each; all of them random and of the image's size."""
    write_folder(tmp_path / "pictures")
    for number, size in enumerate(SIZES):
        path = tmp_path / "pictures" / f"p{number}.png"
        image = Image.open(path)
        image.putalpha(Image.fromarray(picture(*size, seed=50 + number)[:, :, 0]))
        image.save(path)
        write_picture(tmp_path / "masks" / f"p{number}.png", *size, seed=100 + number)
        write_picture(tmp_path / "controls" / f"p{number}.webp", *size, seed=200 + number)
    return tmp_path


def with_masks(folder, **changes):
    return subset(folder / "pictures", mask_dir=str(folder / "masks"), **changes)


def with_alpha(folder, **changes):
    return subset(folder / "pictures", alpha_mask=True, **changes)


def built(spec, **settings):
    return build_train_data([spec], **({"seed": 7} | settings))


def masks_of(data, epoch=0):
    """The mask of each sample by the key of its record."""
    found = {}
    for group in data.epoch(epoch):
        for batch in group.micro_batches:
            for number in range(batch.num_real):
                found[batch.keys[number].record] = batch.mask_B1hw[number]
    return found


# --- which file belongs to which image ------------------------------------------------------------------------------


def test_companions_are_found_by_name_or_stem(folder):
    (folder / "masks" / "p0.png").rename(folder / "masks" / "p0.WEBP")
    (folder / "masks" / "other.png").write_bytes(b"nobody's")
    table, report = assemble([dataset(with_masks(folder, control_dir=str(folder / "controls")))])
    assert not report.skipped and len(table) == NUM
    assert table[0].record.mask == str(folder / "masks" / "p0.WEBP")
    assert table[1].record.mask == str(folder / "masks" / "p1.png")
    assert table[1].record.control == str(folder / "controls" / "p1.webp")
    table, _ = assemble([dataset(subset(folder / "pictures"))])
    assert table[0].record.mask is None and table[0].record.control is None


def test_an_image_without_a_fitting_mask_is_left_out_and_named(folder):
    masks = folder / "masks"
    (masks / "p0.png").unlink()
    (masks / "p1.png").unlink()
    for extension in (".jpg", ".webp"):
        write_picture(masks / f"p1{extension}", 96, 40)
    write_picture(masks / "p2.png", 96, 40)
    (masks / "p3.png").write_bytes(b"")
    table, report = assemble([dataset(with_masks(folder))])
    assert [image.record.key.split("/")[1] for image in table] == ["p4.png", "p5.png", "p6.png"]
    reasons = [reason for _, reason in report.skipped]
    assert [path for path, _ in report.skipped] == [str(folder / "pictures" / f"p{n}.png") for n in range(4)]
    assert reasons[0] == f"it has no mask: there is no {masks / 'p0'}.*"
    assert reasons[1] == "its mask could be any of p1.jpg, p1.webp"
    assert reasons[2] == "its mask is 96x40, another aspect ratio than the image's 40x96"
    assert "p3.png: the picture file is empty" in reasons[3]


def test_masks_of_a_metadata_file_lie_in_the_same_sub_folders(folder):
    for name, seed in (("a", 1), ("b", 2)):
        write_picture(folder / "all" / name / "x.png", 64, 64, seed=seed)
        write_picture(folder / "marks" / name / "x.png", 64, 64, seed=seed)
    meta = folder / "meta.json"
    meta.write_text('{"a/x.png": {"caption": "c"}, "b/x": {"caption": "d"}}')
    spec = subset(folder / "all", metadata_file=str(meta), mask_dir=str(folder / "marks"))
    table, report = assemble([dataset(spec)])
    assert not report.skipped
    assert [image.record.mask for image in table] == [str(folder / "marks" / name / "x.png") for name in "ab"]


def test_masks_are_not_opened_again(folder, monkeypatch):
    for place in ("masks", "pictures"):
        for path in (folder / place).iterdir():
            os.utime(path, (1, 1))  # what has just been written is not yet relied on
    assemble([dataset(with_masks(folder))])
    opened = []
    monkeypatch.setattr(file_facts, "read_size", opened.append)
    table, _ = assemble([dataset(with_masks(folder))])
    assert not opened and len(table) == NUM and table[1].record.mask == str(folder / "masks" / "p1.png")


@pytest.mark.parametrize(
    ("companion", "image", "fits"),
    [
        ((500, 333), (1000, 667), True),
        ((500, 334), (1000, 667), True),
        ((2000, 1334), (1000, 667), True),
        ((10, 100), (105, 1000), True),
        ((96, 40), (40, 96), False),
        ((500, 330), (1000, 667), False),
        ((512, 512), (1000, 667), False),
        ((1000, 669), (1000, 667), False),
    ],
)
def test_companions_may_be_scaled_but_not_stretched(companion, image, fits):
    assert has_aspect_of(Size(*companion), Size(*image)) == fits == has_aspect_of(Size(*image), Size(*companion))


# --- cut exactly as the image ---------------------------------------------------------------------------------------


@given(
    st.integers(40, 200),
    st.integers(40, 200),
    st.sampled_from([None, *SOFT_FILTERS]),
    st.booleans(),
    st.integers(0, 99),
    st.booleans(),
)
def test_a_mask_that_is_a_channel_stays_that_channel(w, h, name, flip, seed, at_random):
    """Through resize, crop and mirror: every pixel of the mask stays with its pixel of the image."""
    placement = BucketPolicy(Size(64, 64), minimum=32, maximum=128, step=32).place(Size(w, h))
    if name is None and (placement.resized.w > w or placement.resized.h > h):
        name = "linear"  # enlarging without a filter is Lanczos for the image and linear for its mask
    image = picture(w, h, seed=seed)
    rng = random.Random(seed) if at_random else None
    pixels_3HW, crop = load_sample(image, placement, flip=flip, crop_rng=rng, interpolation=name)
    mask_HW = cut_mask(np.ascontiguousarray(image[:, :, 0]), crop, interpolation=name)
    control_3HW = cut_control(image, crop, interpolation=name)
    assert torch.equal(torch.round(mask_HW * 255), torch.round((pixels_3HW[0] + 1) * 127.5))
    assert torch.equal(control_3HW, pixels_3HW)


@pytest.mark.parametrize("name", [None, "lanczos", "cubic", "bicubic"])
def test_an_enlarged_mask_does_not_ring(name):
    mask = np.zeros((16, 16), np.uint8)
    mask[:, 8:] = 200
    placement = Placement(Size(64, 64), Size(64, 64), 0.0)
    _, crop = load_sample(np.zeros((16, 16, 3), np.uint8), placement)
    cut_HW = cut_mask(mask, crop, interpolation=name)
    assert cut_HW[:, :24].max() == 0 and (cut_HW[:, 40:] * 255).unique().tolist() == [200]


def test_a_mask_of_another_size_covers_the_same_part(folder):
    """Each mask marks one quarter; at half or twice its size it still marks that quarter."""
    masks = []
    for number, scale in enumerate((1, 0.5, 2)):
        place = folder / f"scaled{number}"
        place.mkdir()
        for index, (w, h) in enumerate(SIZES):
            mask = np.zeros((int(h * scale), int(w * scale)), np.uint8)
            mask[: mask.shape[0] // 2, : mask.shape[1] // 2] = 255
            Image.fromarray(mask).save(place / f"p{index}.png")
        spec = subset(folder / "pictures", mask_dir=str(place), flip_aug=True)
        masks.append(masks_of(built(dataset(spec))))
    for key, mask_1hw in masks[0].items():
        assert 0.15 < mask_1hw.mean() < 0.35
        for other in masks[1:]:
            assert (mask_1hw - other[key]).abs().mean() < 0.05


@pytest.mark.parametrize("changes", [{}, {"flip_aug": True}, {"flip_aug": True, "random_crop": True}])
def test_the_mask_of_a_sample_is_that_of_its_window(folder, changes):
    """Masks whose red equals that of the image; the batch's mask is the mean of the batch's own pixels."""
    shutil.rmtree(folder / "masks")
    shutil.copytree(folder / "pictures", folder / "masks")
    spec = with_masks(folder, resize_interpolation="area", **changes)
    seen = 0
    for group in built(dataset(spec)).epoch(0):
        for batch in group.micro_batches:
            red_BHW = torch.round((batch.pixels_B3HW[:, 0] + 1) * 127.5) / 255
            expected = torch.stack([mask_cells(red_HW)[None] for red_HW in red_BHW])
            assert torch.equal(batch.mask_B1hw, expected)
            seen += batch.num_real
    assert seen == NUM


# --- batches --------------------------------------------------------------------------------------------------------


def test_samples_without_a_mask_count_everywhere(folder, tmp_path):
    write_picture(tmp_path / "plain" / "q.png", 64, 64, caption="x")
    data = built(dataset(with_alpha(folder), subset(tmp_path / "plain"), batch_size=8))
    masks = masks_of(data)
    assert torch.equal(masks["plain/q.png"], torch.ones(1, 8, 8)) and masks["pictures/p0.png"].min() < 1
    unmasked = built(dataset(subset(folder / "pictures")))
    assert all(batch.mask_B1hw is None for group in unmasked.epoch(0) for batch in group.micro_batches)


def test_the_summary_says_how_many_images_have_a_mask(folder):
    text = built(dataset(with_masks(folder), subset(folder / "controls"))).summary().text()
    assert f"{NUM} images have a loss mask" in text
    assert "mask" not in built(dataset(subset(folder / "pictures"))).summary().text()


def test_opaque_images_have_a_mask_of_ones(tmp_path):
    write_folder(tmp_path / "pictures")
    data = built(dataset(with_alpha(tmp_path)))
    assert all(torch.equal(mask, torch.ones_like(mask)) for mask in masks_of(data).values())


def test_alpha_counts_in_a_png_that_is_named_like_a_jpeg(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 4), dtype=np.uint8)
    path = write_picture(tmp_path / "pictures" / "a.png", 64, 64, caption="x")
    Image.fromarray(pixels).save(path)
    path.rename(path.with_suffix(".jpg"))
    data = build_train_data([dataset(subset(tmp_path / "pictures", alpha_mask=True))], seed=0)
    (batch,) = next(iter(data.epoch(0))).micro_batches
    expected = pixels[:, :, 3].reshape(8, 8, 8, 8).mean(axis=(1, 3)) / 255
    assert np.allclose(batch.mask_B1hw[0, 0], expected, atol=1e-3)


def test_a_mask_that_goes_bad_during_training_costs_its_image(folder):
    data = built(dataset(with_masks(folder), batch_size=8))
    (folder / "masks" / "p0.png").write_bytes(b"gone")
    failures = [failure for group in data.epoch(0) for batch in group.micro_batches for failure in batch.failures]
    assert [os.path.basename(failure.path) for failure in failures] == ["p0.png"]
    assert len(masks_of(data)) == NUM - 1


# --- cached with the latents ----------------------------------------------------------------------------------------


def cache(data, *, to_disk, **options):
    encode = Counting()
    options = {"vae_id": "vae", "to_disk": to_disk, "batch_size": 3} | options
    store, report = build_latents(data.table, encode, options=LatentCacheOptions(**options))
    data.attach_latents(store)
    return encode.images, report


def figures(report):
    return report.built, report.reused, len(report.stale), len(report.failed)


@pytest.mark.parametrize("to_disk", [False, True])
@pytest.mark.parametrize("make", [with_masks, with_alpha])
def test_cached_masks_are_the_uncached_ones_bit_for_bit(folder, make, to_disk):
    spec = dataset(make(folder, flip_aug=True))
    fresh, cached = built(spec), built(spec)
    cache(cached, to_disk=to_disk)
    for epoch in range(3):
        expected, found = masks_of(fresh, epoch), masks_of(cached, epoch)
        assert expected.keys() == found.keys() and len(found) == NUM
        assert all(torch.equal(expected[key], found[key]) for key in found)


def test_masks_on_disk_are_what_sd_scripts_expects(folder):
    data = built(dataset(with_alpha(folder)))
    cache(data, to_disk=True)
    with np.load(folder / "pictures" / "p0_0064x0064_sdxl.npz") as file:
        alpha = np.asarray(Image.open(folder / "pictures" / "p0.png").getchannel("A"))
        assert file["alpha_mask"].dtype == np.float32
        assert np.array_equal(file["alpha_mask"], alpha.astype(np.float32) / 255)


def test_a_changed_mask_is_the_only_entry_built_again(folder):
    spec = dataset(with_masks(folder))
    assert figures(cache(built(spec), to_disk=True)[1]) == (NUM, 0, 0, 0)
    os.utime(folder / "masks" / "p1.png", ns=(1, 1))
    assert figures(cache(built(spec), to_disk=True)[1]) == (0, NUM, 0, 0)
    write_picture(folder / "masks" / "p0.png", 64, 64, seed=999)
    data = built(spec)
    images, report = cache(data, to_disk=True)
    assert (images, figures(report)) == (1, (1, NUM - 1, 1, 0))
    assert report.stale[0].reason == "mask changed"
    expected = mask_cells(torch.from_numpy(picture(64, 64, seed=999)[:, :, 0] / 255).float())
    assert torch.allclose(masks_of(data)["pictures/p0.png"][0], expected)


def test_masks_switched_on_are_added_and_switched_off_not_applied(folder):
    plain, masked = dataset(subset(folder / "pictures")), dataset(with_alpha(folder))
    cache(built(plain), to_disk=True)
    report = cache(built(masked), to_disk=True)[1]
    assert figures(report) == (NUM, 0, NUM, 0) and {stale.reason for stale in report.stale} == {"no mask"}
    data = built(plain)
    assert figures(cache(data, to_disk=True)[1]) == (0, NUM, 0, 0)
    assert all(batch.mask_B1hw is None for group in data.epoch(0) for batch in group.micro_batches)
    assert figures(cache(built(masked), to_disk=True)[1]) == (0, NUM, 0, 0)
    assert {stale.reason for stale in cache(built(dataset(with_masks(folder))), to_disk=True)[1].stale} == {
        "mask changed"
    }


def test_a_mask_that_sd_scripts_cached_is_used_for_alpha(folder):
    data = built(dataset(with_alpha(folder, flip_aug=True)))
    ramp_HW = np.arange(64, dtype=np.float32).repeat(64).reshape(64, 64).T / 64
    row = data.table[0]
    np.savez(
        latent_cache.latent_cache_path(row.record.path, row.record.size),
        latents=np.zeros((4, 8, 8), np.float32),
        latents_flipped=np.ones((4, 8, 8), np.float32),
        alpha_mask=ramp_HW,
        original_size=np.array([64, 64]),
        crop_ltrb=np.zeros(4),
    )
    assert figures(cache(data, to_disk=True)[1]) == (NUM - 1, 1, 0, 0)
    seen = set()
    for epoch in range(8):
        mask_1hw = masks_of(data, epoch)["pictures/p0.png"]
        expected = mask_cells(torch.from_numpy(ramp_HW))
        is_flipped = not torch.equal(mask_1hw[0], expected)
        assert torch.equal(mask_1hw[0], expected.flip(-1) if is_flipped else expected)
        seen.add(is_flipped)
    assert seen == {False, True}


@pytest.mark.parametrize("to_disk", [False, True])
def test_one_image_with_two_masks_has_two_entries(folder, to_disk):
    plain, masked, alpha = subset(folder / "pictures"), with_masks(folder), with_alpha(folder)
    specs = [dataset(one, batch_size=1) for one in (plain, masked, alpha)]
    fresh, cached = (build_train_data(specs, seed=1) for _ in range(2))
    assert cache(cached, to_disk=to_disk)[0] == 3 * NUM
    for one, two in zip(fresh.epoch(0), cached.epoch(0), strict=True):
        (a,), (b,) = one.micro_batches, two.micro_batches
        assert a.keys == b.keys and (a.mask_B1hw is None) == (b.mask_B1hw is None)
        assert a.mask_B1hw is None or torch.equal(a.mask_B1hw, b.mask_B1hw)
    again = build_train_data(specs, seed=1)
    assert figures(cache(again, to_disk=True)[1]) == ((0, 3 * NUM, 0, 0) if to_disk else (3 * NUM, 0, 0, 0))


# --- condition images -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("to_disk", "num_workers"), [(None, 0), (False, 0), (False, 1), (True, 1)])
def test_condition_images_come_with_latents_and_pixels_alike(folder, to_disk, num_workers):
    """Copies of the images as condition images: they are the pixels of the batch, cached latents or not."""
    shutil.rmtree(folder / "controls")
    shutil.copytree(folder / "pictures", folder / "controls")
    spec = dataset(subset(folder / "pictures", control_dir=str(folder / "controls"), flip_aug=True))
    fresh, data = built(spec), built(spec, num_workers=num_workers)
    if to_disk is not None:
        cache(data, to_disk=to_disk)
    for one, two in zip(fresh.epoch(0), data.epoch(0), strict=True):
        for a, b in zip(one.micro_batches, two.micro_batches, strict=True):
            assert b.control_B3HW.dtype == torch.float32
            assert torch.equal(a.pixels_B3HW, b.control_B3HW) and a.keys == b.keys
            assert (b.pixels_B3HW is None) == (to_disk is not None)


def test_a_rank_with_nothing_readable_still_has_a_condition_image(folder):
    data = built(dataset(subset(folder / "pictures", control_dir=str(folder / "controls")), batch_size=8))
    for path in (folder / "controls").iterdir():
        path.write_bytes(b"gone")
    for group in data.epoch(0):
        for batch in group.micro_batches:
            assert batch.num_real == 0 and batch.control_B3HW.shape == batch.pixels_B3HW.shape
