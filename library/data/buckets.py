"""Aspect-ratio buckets: which training size an image gets, and to what size it is resized before the crop.

Formulas are those of sd-scripts (pure integer and float64 arithmetic), so that images land in the same buckets.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from library.sizes import Size


class Placement(NamedTuple):
    """Where an image goes: resize to `resized`, then crop to `bucket`. `ar_error` is bucket w/h minus image w/h."""

    bucket: Size
    resized: Size
    ar_error: float


class UnplaceableImage(ValueError):
    """The image fits no bucket; the message says why."""


def bucket_list(resolution: Size, *, minimum: int, maximum: int, step: int) -> list[Size]:
    """All predefined buckets, ascending by (w, h): no larger in area than `resolution`, sides multiples of `step`.

    `minimum` and `maximum` bound the sides and must be multiples of `step` (`BucketPolicy` aligns them).
    """
    area = resolution.w * resolution.h
    square = int(math.sqrt(area) // step) * step
    found = {Size(square, square)}
    for width in range(minimum, maximum + 1, step):
        height = min(maximum, (area // width) // step * step)
        if height >= minimum:
            found |= {Size(width, height), Size(height, width)}
    return sorted(found)


def cover(image: Size, bucket: Size) -> Size:
    """The size to which `image` is scaled, aspect kept, so that it just covers `bucket`."""
    scale = bucket.h / image.h if image.w / image.h > bucket.w / bucket.h else bucket.w / image.w
    return Size(int(image.w * scale + 0.5), int(image.h * scale + 0.5))


@dataclass(frozen=True)
class BucketPolicy:
    """The bucketing rules of one data set.

    Without `enable_bucket` there is one bucket, `resolution`, and every image is scaled to cover it and cropped.
    `no_upscale` has no list: an image keeps its size unless its area exceeds `resolution`'s, and sides are cut down
    to multiples of `step`. Otherwise both sides of `resolution` lie between `minimum` and `maximum`.
    """

    resolution: Size
    enable_bucket: bool = True
    minimum: int = 256
    maximum: int = 1024
    step: int = 64
    no_upscale: bool = False

    def __post_init__(self) -> None:
        if self.enable_bucket:
            assert self.step > 0
            low, high = self.bounds
            assert self.no_upscale or low <= min(self.resolution) <= max(self.resolution) <= high, self

    @property
    def bounds(self) -> tuple[int, int]:
        """The smallest and largest side, aligned outward to multiples of `step`; at least one step."""
        low = max(self.step, self.minimum // self.step * self.step)
        return low, -(-self.maximum // self.step) * self.step

    @cached_property
    def sizes(self) -> list[Size]:
        """The predefined buckets; empty with `no_upscale`, where buckets follow from the images."""
        if not self.enable_bucket:
            return [self.resolution]
        if self.no_upscale:
            return []
        low, high = self.bounds
        return bucket_list(self.resolution, minimum=low, maximum=high, step=self.step)

    def place(self, image: Size) -> Placement:
        """The bucket and the resized size of an image of `image` pixels. Raises UnplaceableImage."""
        if image.w < 1 or image.h < 1:
            raise UnplaceableImage(f"the image has no area ({image.w}x{image.h})")
        if self.enable_bucket and self.no_upscale:
            bucket, resized = self._place_no_upscale(image)
        else:
            bucket = self._nearest(image)
            resized = cover(image, bucket)
        return Placement(bucket, resized, bucket.w / bucket.h - image.w / image.h)

    def _nearest(self, image: Size) -> Size:
        """The listed bucket whose w/h is nearest; the exact size wins, then the first of equals."""
        if image in self._members:
            return image
        aspect = image.w / image.h
        return min(self.sizes, key=lambda size: abs(size.w / size.h - aspect))

    @cached_property
    def _members(self) -> frozenset[Size]:
        return frozenset(self.sizes)

    def _place_no_upscale(self, image: Size) -> tuple[Size, Size]:
        resized = image if image.area <= self.resolution.area else self._shrink_to_area(image)
        bucket = Size(resized.w // self.step * self.step, resized.h // self.step * self.step)
        if bucket.w == 0 or bucket.h == 0:
            raise UnplaceableImage(
                f"{image.w}x{image.h} leaves a side of {min(resized)} px, less than bucket_reso_steps {self.step}, "
                "and bucket_no_upscale forbids enlarging it"
            )
        return bucket, resized

    def _shrink_to_area(self, image: Size) -> Size:
        """Shrink to `resolution`'s area with one side a multiple of `step`, by whichever side keeps w/h better."""
        aspect = image.w / image.h
        width = math.sqrt(self.resolution.area * aspect)
        height = self.resolution.area / width
        by_width = self._floor(width)
        height_by_width = self._floor(by_width / aspect)
        by_height = self._floor(height)
        width_by_height = self._floor(by_height * aspect)
        if not (by_width and by_height and height_by_width and width_by_height):
            raise UnplaceableImage(
                f"{image.w}x{image.h} is too narrow: at the training area a side is less than "
                f"bucket_reso_steps {self.step}"
            )
        error_by_width = abs(by_width / height_by_width - aspect)
        error_by_height = abs(width_by_height / by_height - aspect)
        if error_by_width < error_by_height:
            return Size(by_width, int(by_width / aspect + 0.5))
        return Size(int(by_height * aspect + 0.5), by_height)

    def _floor(self, length: float) -> int:
        nearest = int(length + 0.5)
        return nearest - nearest % self.step
