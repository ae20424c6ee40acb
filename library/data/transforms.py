"""From a decoded image to the window that is trained on, and the record of what was cut away. Needs no torch."""

from __future__ import annotations

import random
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image

from library.data.buckets import Placement
from library.data.companions import aspect_problem, has_aspect_of
from library.data.records import ImageRecord
from library.diffusion.crops import CropInfo
from library.errors import UserError
from library.io.images import JPEG_SCALES, Picture, read_image, read_mask, read_picture, scaled_side
from library.sizes import Size

_CV2_FILTERS = {
    "nearest": cv2.INTER_NEAREST_EXACT,
    "bilinear": cv2.INTER_LINEAR,
    "linear": cv2.INTER_LINEAR,
    "bicubic": cv2.INTER_CUBIC,
    "cubic": cv2.INTER_CUBIC,
    "area": cv2.INTER_AREA,
}
_PIL_FILTERS = {"lanczos": Image.Resampling.LANCZOS, "box": Image.Resampling.BOX}

_SMOOTH_FILTERS = frozenset({"nearest", "bilinear", "linear", "area", "box"})
"""Filters whose results never leave the range of the pixels they are made from."""
_MOST_MOVED = 1 / 8  # pixels of the resized image

INTERPOLATIONS = (*_CV2_FILTERS, *_PIL_FILTERS)
"""The names that `resize_interpolation` accepts."""


def resize(image: np.ndarray, size: Size, *, interpolation: str | None = None) -> np.ndarray:
    """Scale an (H, W, 3) or (H, W) uint8 image to `size`.

    Without `interpolation`: OpenCV's area average when neither side grows, Pillow's Lanczos otherwise.
    """
    height, width = image.shape[:2]
    if (width, height) == (size.w, size.h):
        return image
    if interpolation is None:
        interpolation = "area" if size.w <= width and size.h <= height else "lanczos"
    if interpolation in _PIL_FILTERS:
        return np.array(Image.fromarray(image).resize((size.w, size.h), _PIL_FILTERS[interpolation]))
    return cv2.resize(image, (size.w, size.h), interpolation=_CV2_FILTERS[interpolation])


def crop_offset(resized: Size, bucket: Size, *, rng: random.Random | None = None) -> tuple[int, int]:
    """(top, left) of the crop window in the resized image: centred, or drawn evenly from `rng`."""
    trim_x, trim_y = resized.w - bucket.w, resized.h - bucket.h
    if rng is None:
        return trim_y // 2, trim_x // 2
    return rng.randint(0, trim_y), rng.randint(0, trim_x)


def crop_info(original: Size, placement: Placement, *, flipped: bool, rng: random.Random | None = None) -> CropInfo:
    """What resizing and cropping by `placement` does to an image of size `original`; nothing is read or drawn but
    the crop offset, so a cached sample gets the same record as a freshly decoded one."""
    top, left = crop_offset(placement.resized, placement.bucket, rng=rng)
    return CropInfo(
        original=original, top=top, left=left, target=placement.bucket, resized=placement.resized, flipped=flipped
    )


def apply_crop(image: np.ndarray, crop: CropInfo, *, interpolation: str | None = None) -> np.ndarray:
    """Resize, cut out and mirror an (H, W, 3) uint8 image as `crop` says; contiguous, uint8."""
    return _cut(resize(image, crop.resized, interpolation=interpolation), crop)


def apply_crop_to_mask(mask: np.ndarray, crop: CropInfo, *, interpolation: str | None = None) -> np.ndarray:
    """Resize, cut out and mirror an (H, W) uint8 mask exactly as its image; the mask may be of another size.

    Filters that overshoot (Lanczos, cubic) would draw a halo of weight around every edge: in their place, and without
    `interpolation`, an area average when neither side grows, and a linear one otherwise.
    """
    if interpolation not in _SMOOTH_FILTERS:
        height, width = mask.shape
        interpolation = "area" if crop.resized.w <= width and crop.resized.h <= height else "linear"
    return _cut(resize(mask, crop.resized, interpolation=interpolation), crop)


def _cut(resized: np.ndarray, crop: CropInfo) -> np.ndarray:
    window = resized[crop.top : crop.top + crop.target.h, crop.left : crop.left + crop.target.w]
    if crop.flipped:
        window = window[:, ::-1]
    assert window.shape[:2] == (crop.target.h, crop.target.w), (window.shape, crop)
    return np.ascontiguousarray(window)


def read_record(record: ImageRecord, resized: Size | None = None) -> np.ndarray:
    """The decoded image, uint8 (H, W, 3); for an image that will be `resized` scaled down as `decode_scale` says.

    Raises UserError when it is unreadable or no longer of the scanned size.
    """
    return _read(record, resized).pixels


def _read(record: ImageRecord, resized: Size | None, *, with_alpha: bool = False) -> Picture:
    scale = 1 if resized is None else decode_scale(record, resized)
    image = read_picture(record.path, scale=scale, with_alpha=with_alpha)
    if image.size != record.size:
        what = f"the image is now {image.size}; it was {record.size} when the run started"
        raise UserError(what, where=record.path)
    return image


class Pictures(NamedTuple):
    """The decoded files of a record, uint8: image (H, W, 3), mask (H, W) and condition image (H, W, 3), if any.

    The companions may be of another size than the image, but have its aspect ratio.
    """

    image: np.ndarray
    mask: np.ndarray | None = None
    control: np.ndarray | None = None


def read_pictures(record: ImageRecord, resized: Size | None = None, *, with_control: bool = True) -> Pictures:
    """Decode what belongs to a record. Raises UserError as `read_record` does, and when a companion does not fit."""
    control = read_control(record) if with_control else None
    if record.mask is not None:
        mask = _fitting(record.mask, read_mask(record.mask), record.size)
        return Pictures(read_record(record, resized), mask, control)
    image = _read(record, resized, with_alpha=record.subset.alpha_mask)
    return Pictures(image.pixels, image.alpha, control)


def cut_plain(pictures: Pictures, record: ImageRecord, placement: Placement) -> Pictures:
    """The image, not mirrored, and its mask as they are cached: resized and cut to the bucket of `placement`.

    `pictures` are what `read_pictures` gives for a placement of the same `decode_scale`.
    """
    crop, filter_name = crop_info(record.size, placement, flipped=False), record.subset.resize_interpolation
    mask = pictures.mask
    if mask is not None:
        mask = apply_crop_to_mask(mask, crop, interpolation=filter_name)
    return Pictures(apply_crop(pictures.image, crop, interpolation=filter_name), mask)


def read_control(record: ImageRecord) -> np.ndarray | None:
    """The condition image of a record, uint8 (H, W, 3); raises UserError when it does not fit or cannot be read."""
    return None if record.control is None else _fitting(record.control, read_image(record.control), record.size)


def _fitting(path: str, companion: np.ndarray, image: Size) -> np.ndarray:
    size = _size_of(companion)
    if not has_aspect_of(size, image):
        raise UserError(f"the picture {aspect_problem(size, image)}", where=path, fix="scale it as a whole")
    return companion


def _size_of(image: np.ndarray) -> Size:
    return Size(image.shape[1], image.shape[0])


def decode_scale(record: ImageRecord, resized: Size) -> int:
    """By how much the sides of a JPEG that will be `resized` are divided while it is decoded: 1, 2, 4 or 8.

    By 2 whenever both sides shrink by more than 2. By 4 or 8 when that leaves at least two decoded pixels for one of
    the resized image, so that the area filter still does the last half of the work, and when no pixel moves by more
    than an eighth because a side that cannot be divided is rounded. (At 1/2 an odd side moves the far edge by up to
    half a pixel.) What that changes, in levels of 255 against the same resize of the whole image, and what it saves, is
    measured by benchmarks/scaled_decode.py; docs/differences.md has the figures. Other filters take samples of the
    whole image. The file must be a JPEG by its name; one that only has such a name comes whole. Cached and uncached
    training decode alike.
    """
    is_jpeg = record.path.lower().endswith((".jpg", ".jpeg"))
    if not is_jpeg or record.subset.resize_interpolation not in (None, "area"):
        return 1
    sides = list(zip(record.size, resized, strict=True))

    def suits(scale: int) -> bool:
        if scale == 2:
            return all(side > 2 * target for side, target in sides)
        moved = [abs(scaled_side(side, scale) * scale - side) * target / side for side, target in sides]
        return max(moved) <= _MOST_MOVED and all(side >= 2 * scale * target for side, target in sides)

    return max(scale for scale in JPEG_SCALES if scale == 1 or suits(scale))
