"""Aspect-ratio buckets: which training size an image gets, and to what size it is resized before the crop.

There are two ways to choose. `sdscripts` has the formulas of sd-scripts (pure integer and float64 arithmetic), so that
images land in the same buckets. `area` takes, of all sizes whose sides are multiples of the step and whose area is at
most that of the resolution, the one with the largest product of two shares: that of the image which the crop keeps, and
that of the training area which the bucket uses. Limits to the crop and to the enlargement move an image that breaks
them to the best size, in the sense of `area`, that keeps them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, NoReturn

from library.sizes import Size


class Placement(NamedTuple):
    """Where an image goes: resize to `resized`, then crop to `bucket`. `ar_error` is bucket w/h minus image w/h."""

    bucket: Size
    resized: Size
    ar_error: float

    @property
    def cropped(self) -> float:
        """The share of the resized image's pixels that the crop cuts off, in [0, 1)."""
        return 1 - self.bucket.area / self.resized.area


class Fit(NamedTuple):
    """A placement and how it was come by.

    `enlarged` is the factor by which the sides of the image grow, 1 for an image that does not grow. `is_moved`: the
    placement that was chosen first breaks a limit, this one does not. `is_over`: it breaks one, as every size does.
    """

    placement: Placement
    enlarged: float
    is_moved: bool = False
    is_over: bool = False


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


def best_bucket(
    image: Size, *, area: int, smallest: int, largest: Size, step: int, accepts: Callable[[Size], bool]
) -> Size | None:
    """The size of at most `area` pixels that makes the most of an image; None when `accepts` takes none.

    Sides are multiples of `step`, from `smallest` (a multiple too) to those of `largest`. The image is scaled to cover
    the bucket. It then keeps the share min(a, b) / max(a, b) of its pixels, with a = bucket.w * image.h and
    b = bucket.h * image.w, and since a * b is the product of both areas, share times bucket area is min(a, b) ** 2 /
    image.area. Hence: the largest min(a, b), of equals the one that is cropped least. The numbers are whole and know no
    portrait from landscape, so the transposed image gets the transposed bucket. (Two sizes can tie only by a, b of the
    one being b, a of the other; then a size of both smaller sides is not cropped at all and beats them.)
    """

    def merit(bucket: Size) -> tuple[int, int]:
        across, along = bucket.w * image.h, bucket.h * image.w
        return min(across, along), -max(across, along)

    candidates = []
    for width in range(smallest, largest.w + 1, step):
        highest = min(largest.h, area // width) // step * step
        below = width * image.h // image.w // step * step
        # Any other height for this width is cropped more and is no better.
        for height in (below, below + step):
            size = Size(width, min(max(height, smallest), highest))
            if highest >= smallest and accepts(size):
                candidates.append(size)
    return max(candidates, key=merit, default=None)


def enlargement(image: Size, bucket: Size) -> float:
    """The factor by which the sides of `image` grow until it covers `bucket`; 1 when it covers it already."""
    return max(bucket.w / image.w, bucket.h / image.h, 1.0)


def _placement(image: Size, bucket: Size, resized: Size) -> Placement:
    return Placement(bucket, resized, bucket.w / bucket.h - image.w / image.h)


@dataclass(frozen=True)
class BucketPolicy:
    """The bucketing rules of one data set.

    Without `enable_bucket` there is one bucket, `resolution`, and every image is scaled to cover it and cropped.
    `no_upscale` has no list: an image keeps its size unless its area exceeds `resolution`'s, and sides are cut down
    to multiples of `step`. Otherwise both sides of `resolution` lie between `minimum` and `maximum`.

    `selection` is "sdscripts" or "area" (see the top of this file). `max_crop` is the largest share of pixels that may
    be cut off, `max_upscale` the largest factor by which sides may grow; None is no limit.
    """

    resolution: Size
    enable_bucket: bool = True
    minimum: int = 256
    maximum: int = 1024
    step: int = 64
    no_upscale: bool = False
    selection: str = "sdscripts"
    max_crop: float | None = None
    max_upscale: float | None = None

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
        """The predefined buckets of sd-scripts; empty with `no_upscale`, where buckets follow from the images."""
        if not self.enable_bucket:
            return [self.resolution]
        if self.no_upscale:
            return []
        low, high = self.bounds
        return bucket_list(self.resolution, minimum=low, maximum=high, step=self.step)

    def place(self, image: Size) -> Placement:
        """The bucket and the resized size of an image of `image` pixels. Raises UnplaceableImage."""
        return self.fit(image).placement

    def fit(self, image: Size) -> Fit:
        """The placement of an image of `image` pixels and what the limits did to it. Raises UnplaceableImage.

        The answer for a size is kept: a large data set has few distinct sizes.
        """
        if image not in self._fits:
            self._fits[image] = self._fit(image)
        return self._fits[image]

    @cached_property
    def _fits(self) -> dict[Size, Fit]:
        return {}

    def _fit(self, image: Size) -> Fit:
        if image.w < 1 or image.h < 1:
            raise UnplaceableImage(f"the image has no area ({image.w}x{image.h})")
        chosen = self._choose(image)
        if self._keeps_limits(image, chosen):
            return Fit(chosen, enlargement(image, chosen.bucket))
        better = self._best(image, within_limits=True)
        if better is None:
            return Fit(chosen, enlargement(image, chosen.bucket), is_over=True)
        return Fit(better, enlargement(image, better.bucket), is_moved=True)

    def _choose(self, image: Size) -> Placement:
        """The placement by `selection`, limits aside."""
        if self.enable_bucket and self.selection == "area":
            return self._best(image) or self._too_narrow(image, min(image))
        if self.enable_bucket and self.no_upscale:
            return _placement(image, *self._place_no_upscale(image))
        bucket = self._nearest(image)
        return _placement(image, bucket, cover(image, bucket))

    def _best(self, image: Size, *, within_limits: bool = False) -> Placement | None:
        """The best size of all that the step allows, or of those that keep the limits."""
        low, high = self.bounds
        bucket = best_bucket(
            image,
            area=self.resolution.area,
            smallest=self.step if self.no_upscale else low,
            largest=image if self.no_upscale else Size(high, high),
            step=self.step,
            accepts=lambda size: (
                not within_limits or self._keeps_limits(image, _placement(image, size, cover(image, size)))
            ),
        )
        return None if bucket is None else _placement(image, bucket, cover(image, bucket))

    def _keeps_limits(self, image: Size, placement: Placement) -> bool:
        return (self.max_crop is None or placement.cropped <= self.max_crop) and (
            self.max_upscale is None or enlargement(image, placement.bucket) <= self.max_upscale
        )

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
            self._too_narrow(image, min(resized))
        return bucket, resized

    def _too_narrow(self, image: Size, side: int) -> NoReturn:
        raise UnplaceableImage(
            f"{image.w}x{image.h} leaves a side of {side} px, less than bucket_reso_steps {self.step}, "
            "and bucket_no_upscale forbids enlarging it"
        )

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
