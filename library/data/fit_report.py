"""How well images fit their buckets: what is enlarged, what is cropped, and what the limits did about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from library.data.buckets import BucketPolicy, Fit
from library.data.records import PlacedImage
from library.data.table import ImageTable
from library.sizes import Size

HEAVY_CROP = 0.2
"""Share of pixels; an image that loses more to the crop is counted, since parts of its subject may be gone."""
NAMED = 5


@dataclass(frozen=True)
class FitSummary:
    """Counts of one data set's images at one of its resolutions; `title` says which, "" when there is nothing to tell.

    `most_enlarged` is the largest factor by which sides grow, 1 when nothing is enlarged. `moved` counts the images
    that a limit gave another placement, `over` those that no size keeps within the limits; `named` describes the first
    few of these. `limits` says which there are, "" for none.
    """

    images: int
    enlarged: int
    most_enlarged: float
    heavily_cropped: int
    limits: str
    moved: int
    over: int
    named: tuple[str, ...]
    title: str = ""

    def lines(self) -> list[str]:
        """What there is to say, for the log; nothing when every image fits."""
        lines = []
        if self.enlarged or self.heavily_cropped:
            lines.append(
                f"of {self.images} images {self.enlarged} are enlarged (at most {self.most_enlarged:.2f} times) and "
                f"{self.heavily_cropped} lose more than {HEAVY_CROP:.0%} of their pixels to the crop"
            )
        if self.moved:
            lines.append(f"{self.moved} images have another bucket or resize than without {self.limits}")
        if self.over:
            lines.append(f"{self.over} images stay over {self.limits}: no bucket keeps it")
            lines += [f"  {text}" for text in self.named]
            lines += [f"  ... and {self.over - NAMED} more"] if self.over > NAMED else []
        return lines


def summarise_fits(table: ImageTable, rows: np.ndarray, policy: BucketPolicy, *, title: str = "") -> FitSummary:
    """Count over rows that have been placed by `policy`; each distinct size is looked at once."""
    sides = table.sizes[table.image_of[rows]]
    packed, number_of, counts = np.unique(sides[:, 0] << 32 | sides[:, 1], return_inverse=True, return_counts=True)
    fits = [policy.fit(Size(code >> 32, code & 0xFFFFFFFF)) for code in packed.tolist()]

    def count(is_counted: Callable[[Fit], bool]) -> int:
        return int(counts[[is_counted(fit) for fit in fits]].sum()) if fits else 0

    is_over = np.array([fit.is_over for fit in fits], dtype=bool)
    over = np.flatnonzero(is_over[number_of])
    return FitSummary(
        images=len(rows),
        enlarged=count(lambda fit: fit.enlarged > 1),
        most_enlarged=max((fit.enlarged for fit in fits), default=1.0),
        heavily_cropped=count(lambda fit: fit.placement.cropped > HEAVY_CROP),
        limits=_limits(policy),
        moved=count(lambda fit: fit.is_moved),
        over=len(over),
        named=tuple(_describe(table[int(rows[i])], fits[number_of[i]]) for i in over[:NAMED].tolist()),
        title=title,
    )


def _limits(policy: BucketPolicy) -> str:
    limits = (("bucket_max_crop", policy.max_crop), ("bucket_max_upscale", policy.max_upscale))
    return " or ".join(f"{name} {limit:g}" for name, limit in limits if limit is not None)


def _describe(image: PlacedImage, fit: Fit) -> str:
    return (
        f"{image.record.path}: {image.record.size} in bucket {fit.placement.bucket}, "
        f"{fit.placement.cropped:.1%} cropped, enlarged {fit.enlarged:.2f} times"
    )
