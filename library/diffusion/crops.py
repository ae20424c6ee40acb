"""How a training picture was cut, and the six size ids that tell the U-Net about it. Needs no torch."""

from __future__ import annotations

from typing import NamedTuple

from library.sizes import Size

SizeIds = tuple[int, int, int, int, int, int]


class CropInfo(NamedTuple):
    """How one training picture was cut: resize `original` to `resized`, cut `target` at (left, top), then mirror.

    `top` and `left` are offsets in pixels of the resized picture, before mirroring.
    """

    original: Size
    top: int
    left: int
    target: Size
    resized: Size
    flipped: bool


def size_ids(crop: CropInfo) -> SizeIds:
    """Return the six size ids (original h, w, crop top, left, target h, w) of the crop that was really made.

    A mirrored sample shows the mirrored picture, so its left offset is what lies left of the crop after mirroring:
    `resized.w - target.w - left`.
    """
    left = crop.resized.w - crop.target.w - crop.left if crop.flipped else crop.left
    return (crop.original.h, crop.original.w, crop.top, left, crop.target.h, crop.target.w)


def legacy_crop_ltrb(bucket: Size, image: Size) -> tuple[float, float, float, float]:
    """Return sd-scripts' `crop_ltrb`: the margins of fitting the picture *into* the bucket, not the crop it makes.

    Left, top, right, bottom in bucket pixels; right and bottom may be fractional. Source: spec bucketing.md §4.
    """
    image_aspect = image.w / image.h
    if bucket.w / bucket.h > image_aspect:
        fitted_w, fitted_h = bucket.h * image_aspect, float(bucket.h)
    else:
        fitted_w, fitted_h = float(bucket.w), bucket.w / image_aspect
    left = (bucket.w - fitted_w) // 2
    top = (bucket.h - fitted_h) // 2
    return (left, top, left + fitted_w, top + fitted_h)


def legacy_size_ids(crop: CropInfo) -> SizeIds:
    """Return the size ids that sd-scripts would give this sample (`--legacy_crop_conditioning`).

    They depend on the original and target sizes and the mirror only, never on where the crop was made.
    """
    left, top, right, _ = legacy_crop_ltrb(crop.target, crop.original)
    if crop.flipped:
        left = crop.target.w - right
    return (crop.original.h, crop.original.w, int(top), int(left), crop.target.h, crop.target.w)
