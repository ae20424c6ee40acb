"""Resizing, cropping, flipping, and the record that says where every pixel came from."""

import random

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from library.data.buckets import BucketPolicy, Placement
from library.data.pixels import to_pixels
from library.data.transforms import INTERPOLATIONS, crop_info, resize
from library.diffusion.crops import size_ids
from library.sizes import Size
from tests.data.samples import load_sample
from tests.data.specs import picture


def coordinates(size):
    """An image whose red and green are the x and y of each pixel."""
    y, x = np.mgrid[: size.h, : size.w]
    return np.stack([x, y, np.zeros_like(x)], axis=-1).astype(np.uint8)


def levels(pixels_3HW):
    """Back from [-1, 1] to 0..255."""
    return torch.round((pixels_3HW + 1) * 127.5).to(torch.int64)


@given(st.integers(0, 40), st.integers(0, 40), st.booleans(), st.booleans(), st.integers(0, 99), st.data())
def test_the_crop_record_recovers_the_pixel_it_came_from(extra_w, extra_h, flip, at_random, seed, data):
    bucket = Size(16, 24)
    image = Size(bucket.w + extra_w, bucket.h + extra_h)
    placement = Placement(bucket, image, 0.0)
    rng = random.Random(seed) if at_random else None
    pixels_3HW, crop = load_sample(coordinates(image), placement, flip=flip, crop_rng=rng)
    assert pixels_3HW.shape == (3, bucket.h, bucket.w)
    x, y = data.draw(st.integers(0, bucket.w - 1)), data.draw(st.integers(0, bucket.h - 1))
    source_x = crop.left + (bucket.w - 1 - x if flip else x)
    assert levels(pixels_3HW)[:2, y, x].tolist() == [source_x, crop.top + y]
    # In the mirrored picture's own coordinates the window starts where the size ids say.
    _, _, top, left, _, _ = size_ids(crop)
    mirrored_x = image.w - 1 - source_x if flip else source_x
    assert (mirrored_x - x, crop.top + y - y) == (left, top)


@given(st.integers(1, 400), st.integers(1, 400), st.booleans(), st.integers(0, 99))
def test_any_image_becomes_exactly_its_bucket(w, h, at_random, seed):
    placement = BucketPolicy(Size(64, 64), minimum=32, maximum=128, step=32).place(Size(w, h))
    rng = random.Random(seed) if at_random else None
    pixels_3HW, crop = load_sample(picture(w, h), placement, crop_rng=rng)
    assert pixels_3HW.shape == (3, placement.bucket.h, placement.bucket.w)
    assert 0 <= crop.left <= placement.resized.w - placement.bucket.w
    assert 0 <= crop.top <= placement.resized.h - placement.bucket.h


def test_random_crops_reach_both_borders():
    placement = Placement(Size(16, 16), Size(18, 16), 0.0)
    seen = {crop_info(Size(18, 16), placement, flipped=False, rng=random.Random(seed)).left for seed in range(50)}
    assert seen == {0, 1, 2}


def test_flipping_mirrors_the_same_window():
    placement = Placement(Size(16, 16), Size(24, 16), 0.0)
    plain, _ = load_sample(coordinates(Size(24, 16)), placement)
    flipped, crop = load_sample(coordinates(Size(24, 16)), placement, flip=True)
    assert torch.equal(plain.flip(-1), flipped)
    assert crop.flipped


def test_pixels_span_minus_one_to_one():
    pixels = to_pixels(np.array([[[0, 255, 51]]], dtype=np.uint8))
    assert pixels.dtype == torch.float32
    assert pixels.flatten().tolist() == pytest.approx([-1.0, 1.0, -0.6])


def test_default_filter_is_area_when_shrinking_and_lanczos_when_a_side_grows():
    image = picture(50, 40)
    assert np.array_equal(resize(image, Size(30, 40)), cv2.resize(image, (30, 40), interpolation=cv2.INTER_AREA))
    grown = np.asarray(Image.fromarray(image).resize((60, 30), Image.Resampling.LANCZOS))
    assert np.array_equal(resize(image, Size(60, 30)), grown)


@pytest.mark.parametrize("name", INTERPOLATIONS)
def test_every_named_filter_acts(name):
    image = picture(50, 40)
    out = resize(image, Size(33, 21), interpolation=name)
    assert out.shape == (21, 33, 3) and out.dtype == np.uint8
    same = {"linear": "bilinear", "cubic": "bicubic"}
    for other in INTERPOLATIONS:
        if same.get(name, name) != same.get(other, other):
            assert not np.array_equal(out, resize(image, Size(33, 21), interpolation=other)), other


def test_an_image_of_the_right_size_is_not_touched():
    image = picture(32, 32)
    assert resize(image, Size(32, 32), interpolation="cubic") is image
