"""Everything that is drawn for one visit of an image. Needs no torch, so that a report shows what training sees.

Each draw has a generator of its own, seeded by (run seed, purpose, epoch, record, repeat): no draw depends on another.
"""

from __future__ import annotations

import random
from typing import NamedTuple

from library.data.captions import caption_variant, is_dropped, process_caption
from library.data.colours import ColourShift, draw_colours
from library.data.face_crop import draw_window, face_of
from library.data.records import PlacedImage
from library.data.transforms import crop_info
from library.diffusion.crops import CropInfo
from library.seeds import derive_seed


class Visit(NamedTuple):
    """When an image is used: the epoch and the optimizer step of the run (both from 0), and which of its repeats."""

    epoch: int
    repeat: int = 0
    step: int = 0


class SampleDraw(NamedTuple):
    """What one visit makes of an image: the caption that is tokenised, and the window with its mirroring.

    `variant` is the number of the caption among the cached wordings; `colours` what becomes of the image's colours.
    """

    caption: str
    crop: CropInfo
    variant: int = 0
    colours: ColourShift | None = None


def draw_sample(
    image: PlacedImage,
    visit: Visit,
    *,
    seed: int,
    total_steps: int | None = None,
    is_cached: bool = False,
    num_variants: int = 1,
) -> SampleDraw:
    """The draws of `image` at `visit`.

    `total_steps` is the length of the run in optimizer steps, which a token warm-up over a share of it needs. The crop
    of a cached image (`is_cached`) is the central one, which the cache holds. Where a text cache holds several wordings
    of the caption (`num_variants`), one of these is drawn.
    """

    def rng(purpose: str) -> random.Random:
        return random.Random(derive_seed(seed, purpose, visit.epoch, image.record.key, visit.repeat))

    record, subset, variant = image.record, image.record.subset, 0
    if num_variants == 1:
        caption = process_caption(
            record.caption,
            subset,
            rng=rng("caption"),
            epoch=visit.epoch + 1,
            step=visit.step,
            total_steps=total_steps,
        )
    else:
        variant = rng("caption variant").randrange(num_variants)
        is_empty = is_dropped(subset, rng=rng("caption"), epoch=visit.epoch + 1)
        caption = "" if is_empty else caption_variant(record.caption, subset, key=record.key, number=variant)
    flipped = subset.flip_aug and rng("flip").random() < 0.5
    crop = _draw_crop(image, flipped=flipped, rng=None if is_cached else rng("crop"))
    return SampleDraw(caption, crop, variant, draw_colours(rng("colours")) if subset.color_aug else None)


def _draw_crop(image: PlacedImage, *, flipped: bool, rng: random.Random | None) -> CropInfo:
    """The window by the rules of the image's subset; without `rng` the central one."""
    record, subset, target = image.record, image.record.subset, image.placement.bucket
    face = face_of(record)
    if rng is None or face is None or subset.face_crop_aug_range is None:
        return crop_info(record.size, image.placement, flipped=flipped, rng=rng if subset.random_crop else None)
    window = draw_window(
        face, record.size, target, span=subset.face_crop_aug_range, is_random=subset.random_crop, rng=rng
    )
    return CropInfo(
        original=record.size,
        top=window.top,
        left=window.left,
        target=target,
        resized=window.resized,
        flipped=flipped,
    )
