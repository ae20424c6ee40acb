"""From a decoded image to the window that is trained on, and the record of what was cut away. Needs no torch."""

from __future__ import annotations

import random

import cv2
import numpy as np
from PIL import Image

from library.data.buckets import Placement
from library.data.records import ImageRecord
from library.diffusion.crops import CropInfo
from library.errors import UserError
from library.io.images import JPEG_SCALES, read_picture, scaled_side
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

_MOST_MOVED = 1 / 8  # pixels of the resized image

INTERPOLATIONS = (*_CV2_FILTERS, *_PIL_FILTERS)
"""The names that `resize_interpolation` accepts."""


def resize(image: np.ndarray, size: Size, *, interpolation: str | None = None) -> np.ndarray:
    """Scale an (H, W, 3) uint8 image to `size`.

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
    resized = resize(image, crop.resized, interpolation=interpolation)
    window = resized[crop.top : crop.top + crop.target.h, crop.left : crop.left + crop.target.w]
    if crop.flipped:
        window = window[:, ::-1]
    assert window.shape[:2] == (crop.target.h, crop.target.w), (window.shape, crop)
    return np.ascontiguousarray(window)


def read_record(record: ImageRecord, placement: Placement | None = None) -> np.ndarray:
    """The decoded image, uint8 (H, W, 3); with `placement` scaled down as `decode_scale` says.

    Raises UserError when it is unreadable or no longer of the scanned size.
    """
    image = read_picture(record.path, scale=1 if placement is None else decode_scale(record, placement))
    if image.size != record.size:
        raise UserError(f"the image is now {image.size}; it was {record.size} when the run started", where=record.path)
    return image.pixels


def decode_scale(record: ImageRecord, placement: Placement) -> int:
    """By how much the sides of a JPEG are divided while it is decoded: 1, 2, 4 or 8.

    The largest that leaves at least two decoded pixels for one of the resized image, so the area filter still does the
    last half of the work: on noisy photos the result is then within one level (of 255, in the mean) of that of the
    whole image, and no further from a Lanczos reduction; with fewer pixels the difference doubles. Sides that cannot be
    divided are rounded; no pixel may move by more than an eighth for it. Other filters take samples of the whole image.
    The file must be a JPEG by its name. Cached and uncached training decode alike.
    """
    is_jpeg = record.path.lower().endswith((".jpg", ".jpeg"))
    if not is_jpeg or record.subset.resize_interpolation not in (None, "area"):
        return 1
    sides = list(zip(record.size, placement.resized, strict=True))

    def suits(scale: int) -> bool:
        moved = [abs(scaled_side(side, scale) * scale - side) * resized / side for side, resized in sides]
        return max(moved) <= _MOST_MOVED and all(2 * scale * resized <= side for side, resized in sides)

    return max(scale for scale in JPEG_SCALES if scale == 1 or suits(scale))
