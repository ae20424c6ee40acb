"""Buckets against sd-scripts' worked tables, and what must hold for any image."""

import csv
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from library.data.buckets import BucketPolicy, UnplaceableImage, bucket_list
from library.data.transforms import crop_info
from library.diffusion.crops import legacy_size_ids
from library.sizes import Size

SDXL = Size(1024, 1024)
POLICIES = {
    "A": BucketPolicy(SDXL, minimum=256, maximum=2048, step=64),
    "B": BucketPolicy(SDXL, minimum=256, maximum=2048, step=64, no_upscale=True),
    "C": BucketPolicy(SDXL, minimum=256, maximum=2048, step=32),
    "D": BucketPolicy(SDXL, minimum=256, maximum=2048, step=32, no_upscale=True),
}
with open(Path(__file__).parent / "golden_buckets.csv", encoding="utf-8") as file:
    GOLDEN = list(csv.DictReader(file))


def row_id(row):
    return f"{row['table']}-{row['image_w']}x{row['image_h']}"


def test_the_golden_tables_are_complete():
    assert [sum(row["table"] == table for row in GOLDEN) for table in "ABCD"] == [16, 16, 16, 16]


@pytest.mark.parametrize("row", GOLDEN, ids=row_id)
def test_placement_equals_sd_scripts(row):
    number = {name: int(row[name]) for name in row if name not in ("table", "ar_error")}
    image = Size(number["image_w"], number["image_h"])
    placement = POLICIES[row["table"]].place(image)
    assert placement.bucket == (number["bucket_w"], number["bucket_h"])
    assert placement.resized == (number["resized_w"], number["resized_h"])
    assert round(placement.ar_error, 5) == pytest.approx(float(row["ar_error"]), abs=1e-9)

    plain, flipped = (crop_info(image, placement, flipped=flip) for flip in (False, True))
    assert (plain.left, plain.top) == (number["trim_x"], number["trim_y"])
    assert legacy_size_ids(plain)[2:4] == (number["legacy_top"], number["legacy_left"])
    assert legacy_size_ids(flipped)[2:4] == (number["legacy_flipped_top"], number["legacy_flipped_left"])


def test_bucket_lists_equal_sd_scripts():
    portrait = (
        "256x2048 320x2048 384x2048 448x2048 512x1856 512x1920 512x1984 512x2048 576x1664 576x1728 576x1792 640x1536 "
        "640x1600 704x1408 704x1472 768x1280 768x1344 832x1216 896x1152 960x1088 1024x1024"
    )
    sizes = bucket_list(SDXL, minimum=256, maximum=2048, step=64)
    assert len(sizes) == 41
    assert [str(size) for size in sizes if size.w <= size.h] == portrait.split()
    assert len(bucket_list(SDXL, minimum=256, maximum=2048, step=32)) == 81
    small = bucket_list(Size(512, 512), minimum=256, maximum=1024, step=64)
    assert len(small) == 17
    assert " ".join(str(size) for size in small if size.w <= size.h) == (
        "256x832 256x896 256x960 256x1024 320x704 320x768 384x640 448x576 512x512"
    )


sides = st.integers(1, 6000)
resolutions = st.sampled_from([Size(1024, 1024), Size(512, 768), Size(640, 640)])


@given(sides, sides, resolutions, st.sampled_from([32, 64]), st.booleans())
def test_a_bucket_is_aligned_within_the_area_and_inside_the_resized_image(w, h, resolution, step, no_upscale):
    policy = BucketPolicy(resolution, minimum=256, maximum=2048, step=step, no_upscale=no_upscale)
    try:
        bucket, resized, _ = policy.place(Size(w, h))
    except UnplaceableImage:
        assert no_upscale
        return
    assert bucket.w % step == bucket.h % step == 0
    assert 0 < bucket.w <= resized.w and 0 < bucket.h <= resized.h
    # Without upscaling one side is rounded down and the other follows from the aspect, which may round up.
    assert bucket.area <= resolution.area * (1.002 if no_upscale else 1)
    if no_upscale:
        assert resized.w <= w and resized.h <= h
        assert resized == (w, h) or w * h > resolution.area
    else:
        assert resized.w == bucket.w or resized.h == bucket.h


@pytest.mark.parametrize("image", [Size(20, 500), Size(500, 31), Size(5, 5), Size(60000, 40)])
def test_an_image_narrower_than_the_step_is_refused_with_a_reason(image):
    with pytest.raises(UnplaceableImage, match="bucket_reso_steps 32"):
        POLICIES["D"].place(image)


def test_a_side_is_rounded_before_it_is_cut_to_the_step():
    # sqrt(1024 * 1024 * 1224 / 1600) = 895.63 rounds to 896, a multiple of 64; cut first it would give 832.
    assert POLICIES["B"].place(Size(1224, 1600))[:2] == ((896, 1152), (896, 1171))


def test_an_image_without_area_is_refused():
    with pytest.raises(UnplaceableImage, match="no area"):
        POLICIES["A"].place(Size(0, 0))


def test_without_buckets_every_image_covers_the_resolution():
    policy = BucketPolicy(Size(96, 64), enable_bucket=False)
    assert policy.place(Size(500, 100))[:2] == ((96, 64), (320, 64))
    assert policy.place(Size(30, 30))[:2] == ((96, 64), (96, 96))


def test_bounds_are_aligned_outward():
    policy = BucketPolicy(Size(512, 512), minimum=250, maximum=1000, step=64)
    assert policy.bounds == (192, 1024)
    assert BucketPolicy(Size(512, 512), minimum=1, maximum=1024, step=64).bounds == (64, 1024)


def test_without_upscaling_the_bounds_are_not_looked_at():
    assert BucketPolicy(SDXL, minimum=256, maximum=512, no_upscale=True).place(Size(128, 128)).bucket == (128, 128)
