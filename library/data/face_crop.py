"""Crops around the face that an image's name tells of, as sd-scripts makes them (dataset_config.md §9). Needs no torch.

The shorter side of the crop is `low` to `high` times the face, as far as the image allows: it is never enlarged for it,
and always covers the crop.
"""

from __future__ import annotations

import random
import re
from pathlib import PurePath
from typing import NamedTuple

from library.config.spans import Span
from library.data.records import ImageRecord
from library.sizes import Size

_IN_NAME = re.compile(r".*_(\d{1,9})_(\d{1,9})_(\d{1,9})_(\d{1,9})", re.DOTALL | re.ASCII)
_JITTER = 20
"""The centre of the crop is moved by at most this part of the face."""
_LEAST_JITTERED = 40  # pixels of the image; smaller faces, or those below a tenth of the crop, are centred exactly


class Face(NamedTuple):
    """Centre and size of a face in pixels of the image, as it is shown."""

    cx: int
    cy: int
    w: int
    h: int


class Window(NamedTuple):
    """The size that an image is scaled to, and where in it the crop starts."""

    resized: Size
    top: int
    left: int


def face_in_name(name: str, image: Size) -> Face | None:
    """The face of an image of size `image` whose file name is `<name>_<cx>_<cy>_<w>_<h>.<extension>`.

    None where the name does not end so, or tells of a face without area or with a centre outside of the image.
    """
    found = _IN_NAME.fullmatch(PurePath(name).stem)
    if found is None:
        return None
    face = Face(*map(int, found.groups()))
    is_inside = 0 < face.cx < image.w and 0 < face.cy < image.h
    return face if is_inside and face.w and face.h else None


def face_of(record: ImageRecord) -> Face | None:
    """The face that the crop of an image follows; None where its subset or its name asks for none."""
    if record.subset.face_crop_aug_range is None:
        return None
    return face_in_name(record.path, record.size)


def draw_window(face: Face, image: Size, target: Size, *, span: Span, is_random: bool, rng: random.Random) -> Window:
    """A crop of size `target` around the face of an image of size `image`.

    The scale is drawn evenly between those at which the shorter side of `target` is `span.high` and `span.low` times
    the face's longer side; both are kept between the scale at which the image just covers `target` and 1. (An image
    that is smaller than `target` is enlarged to cover it.) The crop is centred on the face, moved on each axis by up to
    1/20 of the face in pixels of the image; with `is_random` by the sum of two even draws, which together reach the
    farther edge of the image. A span of one number moves nothing. The crop then stays inside the image.
    """
    low, high = scale_bounds(face, image, target, span=span)
    scale = low if low >= high else rng.uniform(low, high)
    resized = Size(max(target.w, int(image.w * scale + 0.5)), max(target.h, int(image.h * scale + 0.5)))
    face_size = max(face.w, face.h)
    is_moved = span.low != span.high and face_size >= _LEAST_JITTERED and face_size > min(target) // 10
    jitter = face_size // _JITTER if is_moved else 0

    def start(centre: int, length: int, side: int) -> int:
        centre = int(centre * scale + 0.5)
        first = centre - side // 2
        if is_random:
            reach = max(length - centre, centre)
            first += rng.randint(0, reach) + rng.randint(0, reach) - reach
        elif jitter:
            first += rng.randint(-jitter, jitter)
        return max(0, min(first, length - side))

    top = start(face.cy, resized.h, target.h)
    return Window(resized, top, start(face.cx, resized.w, target.w))


def scale_bounds(face: Face, image: Size, target: Size, *, span: Span) -> tuple[float, float]:
    """The smallest and the largest scale that `draw_window` draws, as factors of the image's sides."""
    fit = max(target.w / image.w, target.h / image.h)
    face_size = max(face.w, face.h)
    low = max(fit, min(1.0, min(target) / (face_size * span.high)))
    return low, max(low, min(1.0, min(target) / (face_size * span.low)))
