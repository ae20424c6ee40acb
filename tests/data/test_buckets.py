"""Buckets against sd-scripts' worked tables, and what must hold for any image."""

import csv
import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from library.data.assemble import policies_of
from library.data.buckets import BucketPolicy, Placement, UnplaceableImage, bucket_list, cover, enlargement
from library.data.transforms import crop_info
from library.diffusion.crops import legacy_size_ids
from library.sizes import Size
from tests.data.specs import dataset

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


def kept(image, bucket):
    """The share of the image's area that its cover of the bucket keeps."""
    return min(image.aspect / bucket.aspect, bucket.aspect / image.aspect)


def worth(image, bucket):
    return kept(image, bucket) * bucket.area


def all_sizes(policy, image):
    """Every size that the step allows, by brute force."""
    low, high = policy.bounds
    if policy.no_upscale:
        widths, heights = (range(policy.step, side + 1, policy.step) for side in image)
    else:
        widths = heights = range(low, high + 1, policy.step)
    return [Size(w, h) for w in widths for h in heights if w * h <= policy.resolution.area]


def keeps_limits(policy, image, bucket):
    crop = 1 - bucket.area / cover(image, bucket).area
    return crop <= (policy.max_crop or 1) and enlargement(image, bucket) <= (policy.max_upscale or math.inf)


photo_sides = st.integers(64, 5000)
area_policies = st.builds(
    BucketPolicy,
    resolutions,
    minimum=st.just(256),
    maximum=st.just(2048),
    step=st.sampled_from([32, 64]),
    no_upscale=st.booleans(),
    selection=st.just("area"),
)
limited_policies = st.builds(
    BucketPolicy,
    resolutions,
    minimum=st.just(256),
    maximum=st.just(2048),
    step=st.just(64),
    no_upscale=st.booleans(),
    selection=st.sampled_from(["sdscripts", "area"]),
    max_crop=st.none() | st.sampled_from([0.01, 0.1, 0.3]),
    max_upscale=st.none() | st.sampled_from([1.0, 1.5, 3.0]),
)


@pytest.mark.parametrize("no_upscale", [False, True])
def test_by_area_a_nearly_square_photo_fills_the_square(no_upscale):
    image = Size(3072, 3000)
    policy = BucketPolicy(SDXL, maximum=2048, no_upscale=no_upscale, selection="area")
    assert policy.place(image)[:2] == ((1024, 1024), (1049, 1024))
    assert POLICIES["B"].place(image).bucket == (960, 960)


@pytest.mark.parametrize("image", [Size(1024, 1024), Size(832, 1216), Size(1344, 768), Size(512, 512)])
def test_by_area_an_image_of_bucket_size_is_left_as_it_is(image):
    policy = BucketPolicy(SDXL, maximum=2048, no_upscale=True, selection="area")
    assert policy.place(image) == Placement(image, image, 0.0)


@given(area_policies, photo_sides, photo_sides)
def test_by_area_no_size_keeps_more_of_the_image_at_more_of_the_area(policy, w, h):
    image = Size(w, h)
    bucket, resized, _ = policy.place(image)
    sizes = all_sizes(policy, image)
    assert bucket in sizes and resized == cover(image, bucket)
    assert worth(image, bucket) >= max(worth(image, size) for size in sizes) * (1 - 1e-12)
    if policy.no_upscale:
        assert resized.w <= w and resized.h <= h


@given(area_policies, photo_sides, photo_sides)
def test_by_area_a_bucket_is_never_worth_less_than_the_one_of_sd_scripts(policy, w, h):
    image = Size(w, h)
    try:
        theirs = replace(policy, selection="sdscripts").place(image).bucket
    except UnplaceableImage:
        return
    # Without upscaling a side that sd-scripts rounds up can take its bucket a little beyond the area.
    allowed = min(1, policy.resolution.area / theirs.area)
    ours = policy.place(image).bucket
    assert worth(image, ours) >= worth(image, theirs) * allowed * (1 - 1e-12)
    assert ours.area >= theirs.area * kept(image, theirs) * allowed * (1 - 1e-12)


@given(area_policies, limited_policies, photo_sides, photo_sides)
def test_by_area_a_transposed_image_gets_the_transposed_bucket(plain, limited, w, h):
    for policy in (plain, replace(limited, selection="area")):
        policy = replace(policy, resolution=Size(640, 640))
        upright, lying = policy.fit(Size(w, h)), policy.fit(Size(h, w))
        assert upright.placement.bucket == lying.placement.bucket[::-1]
        assert upright.placement.resized == lying.placement.resized[::-1]
        assert upright[1:] == lying[1:]


@given(limited_policies, photo_sides, photo_sides)
def test_limits_are_kept_unless_no_size_keeps_them(policy, w, h):
    image = Size(w, h)
    try:
        free = replace(policy, max_crop=None, max_upscale=None).place(image)
    except UnplaceableImage:
        return
    placement, enlarged, is_moved, is_over = policy.fit(image)
    within = enlarged <= (policy.max_upscale or math.inf) and placement.cropped <= (policy.max_crop or 1)
    assert within != is_over
    keeping = [size for size in all_sizes(policy, image) if keeps_limits(policy, image, size)]
    if is_moved:
        assert placement.bucket in keeping
        assert worth(image, placement.bucket) >= max(worth(image, size) for size in keeping) * (1 - 1e-12)
        assert free != placement
    else:
        assert free == placement
    assert not (is_over and keeping)


def test_a_small_image_is_moved_to_a_smaller_bucket_by_the_upscale_limit():
    policy = replace(POLICIES["A"], max_upscale=1.5)
    assert policy.fit(Size(512, 512)) == (Placement(Size(768, 768), Size(768, 768), 0.0), 1.5, True, False)
    assert policy.fit(Size(700, 700)) == (Placement(Size(1024, 1024), Size(1024, 1024), 0.0), 1024 / 700, False, False)


def test_an_image_that_no_bucket_suits_stays_and_is_marked():
    policy = replace(POLICIES["A"], max_upscale=1.5)
    placement, enlarged, is_moved, is_over = policy.fit(Size(100, 100))
    assert (placement.bucket, enlarged, is_moved, is_over) == ((1024, 1024), 10.24, False, True)


def test_the_crop_limit_finds_a_size_of_the_right_shape():
    image = Size(2000, 1500)
    assert POLICIES["A"].place(image).cropped > 0.03
    placement, _, is_moved, is_over = replace(POLICIES["A"], max_crop=0.03).fit(image)
    assert (placement.bucket, placement.resized, is_moved, is_over) == ((1088, 832), (1109, 832), True, False)
    assert replace(POLICIES["A"], max_crop=0.01).fit(image).placement.bucket == (1024, 768)


def test_a_limit_may_be_reached_and_not_passed():
    image = Size(2000, 1500)
    crop = POLICIES["A"].place(image).cropped
    assert not replace(POLICIES["A"], max_crop=crop).fit(image).is_moved
    assert replace(POLICIES["A"], max_crop=math.nextafter(crop, 0)).fit(image).is_moved
    assert not replace(POLICIES["A"], max_upscale=2.0).fit(Size(512, 512)).is_moved
    assert replace(POLICIES["A"], max_upscale=math.nextafter(2.0, 0)).fit(Size(512, 512)).is_moved


def test_a_data_set_says_its_policy():
    given = {"bucket_no_upscale": True, "bucket_selection": "area", "bucket_max_crop": 0.2, "bucket_max_upscale": 1.5}
    policy = policies_of(dataset(resolution=Size(96, 64), min_bucket_reso=64, bucket_reso_steps=64, **given))[0]
    values = {"minimum": 64, "maximum": 128, "step": 64, "no_upscale": True, "selection": "area"}
    assert policy == BucketPolicy(Size(96, 64), **values, max_crop=0.2, max_upscale=1.5)


def test_a_size_is_placed_once():
    assert POLICIES["A"].fit(Size(640, 480)) is POLICIES["A"].fit(Size(640, 480))
