"""Builds batches, in the main process or in data loader workers, from picklable parts only.

Every random draw of a sample is seeded by (run seed, purpose, epoch, record, repeat), so a batch does not depend on
which worker builds it or on what was built before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from library.data.batching import RankRows, Row
from library.data.colours import ColourShift, shift_colours
from library.data.pixels import cut_control, cut_mask, to_pixels
from library.data.records import READ_ERRORS, PlacedImage, Skipped
from library.data.sample_draws import Visit, draw_sample
from library.data.stores import LatentStore, TextStore
from library.data.table import ImageTable
from library.data.transforms import (
    Pictures,
    apply_crop,
    crop_info,
    cut_plain,
    decode_scale,
    read_control,
    read_pictures,
)
from library.data.types import Awaited, Batch, Beside, SampleKey
from library.diffusion.conditioning import TextCond
from library.diffusion.crops import CropInfo, legacy_size_ids, size_ids
from library.diffusion.masks import CELL, mask_cells
from library.sizes import Size


class Work(NamedTuple):
    """One batch to build: a rank's rows of a micro-batch, the epoch and the optimizer step of the run (from 0)."""

    epoch: int
    rows: RankRows
    step: int = 0


@dataclass(frozen=True, slots=True)
class Sample:
    """One finished row: what it shows (exactly one of `pixels_3HW`, `latents_4hw` and `moments_8hw` is set) and what
    goes with it.

    `awaits` is set when the pixels, of the plain image, are there to be encoded for the cache first; `beside` is the
    image at its other resolutions, as far as they are to be encoded as well.
    """

    key: SampleKey
    caption: str
    crop: CropInfo
    weight: float
    pixels_3HW: Tensor | None = None
    latents_4hw: Tensor | None = None
    moments_8hw: Tensor | None = None
    mask_1hw: Tensor | None = None
    control_3HW: Tensor | None = None
    text: TextCond | None = None
    awaits: Awaited | None = None
    beside: tuple[Beside, ...] = ()


class BatchBuilder(Dataset):
    """Maps Work to Batch. Holds records and stores, no model and no tokenizer, so workers can be spawned."""

    def __init__(
        self,
        table: ImageTable,
        *,
        seed: int,
        legacy_crop: bool,
        latents: LatentStore | None = None,
        text: TextStore | None = None,
        total_steps: int | None = None,
    ) -> None:
        self.table = table
        self.seed = seed
        self.legacy_crop = legacy_crop
        self.latents = latents
        self.text = text
        self.total_steps = total_steps

    def __getitem__(self, work: Work) -> Batch:
        samples: list[Sample] = []
        failures: list[Skipped] = []
        for row in work.rows.rows[: work.rows.num_real]:
            try:
                samples.append(self.load(row, epoch=work.epoch, step=work.step))
            except READ_ERRORS as error:
                failures.append(Skipped.because_of(self.table[row.image].record.path, error))
        num_real = len(samples)
        if not samples:
            samples.append(self._filler(work))
        samples += [samples[0]] * (len(work.rows.rows) - len(samples))
        return self._collate(samples, work=work, num_real=num_real, failures=tuple(failures))

    def load(self, row: Row, *, epoch: int, step: int) -> Sample:
        """One sample, with all its draws for this visit."""
        image = self.table[row.image]
        member = self._image_of(row)
        caption, crop, variant, colours = draw_sample(
            image,
            Visit(epoch, row.repeat, step),
            seed=self.seed,
            total_steps=self.total_steps,
            is_cached=self.latents is not None,
            num_variants=1 if self.text is None else self.text.num_variants(member),
        )
        sample = self._picture(image, row, crop=crop, colours=colours)
        text = None if self.text is None else self.text.get(member, variant=variant, empty=caption == "")
        return replace(sample, caption=caption, text=text)

    def _picture(self, image: PlacedImage, row: Row, *, crop: CropInfo, colours: ColourShift | None) -> Sample:
        """What a sample shows, without its text; from the cache when there is one."""
        record, filter_name = image.record, image.record.subset.resize_interpolation
        key = SampleKey(record.key, row.repeat)
        pictures = None
        if self.latents is not None and not self.latents.awaits(row.image):
            sample = self._cached(key, crop, row, weight=record.weight)
            control_HW3 = read_control(record)
        else:
            image_HW3, mask_HW, control_HW3 = pictures = read_pictures(record, crop.resized)
            window_HW3 = apply_crop(image_HW3, crop, interpolation=filter_name)
            pixels = to_pixels(window_HW3 if colours is None else shift_colours(window_HW3, colours))
            mask = None if mask_HW is None else mask_cells(cut_mask(mask_HW, crop, interpolation=filter_name))[None]
            awaits = None
            if self.latents is not None:
                awaits = Awaited(row.image, crop.flipped)
                pixels = pixels.flip(-1) if crop.flipped else pixels
            sample = Sample(key, "", crop, record.weight, pixels_3HW=pixels, mask_1hw=mask, awaits=awaits)
        sample = replace(sample, beside=self._beside(image, row, pictures))
        if control_HW3 is None:
            return sample
        return replace(sample, control_3HW=cut_control(control_HW3, crop, interpolation=filter_name))

    def _cached(self, key: SampleKey, crop: CropInfo, row: Row, *, weight: float) -> Sample:
        """Latents or, where they are kept, the moments from which every epoch draws its own."""
        assert self.latents is not None
        latents, mask, moments = self.latents.get(row.image, flipped=crop.flipped)
        if latents.shape[-2:] != (crop.target.h // CELL, crop.target.w // CELL):
            raise ValueError(f"the cached latents are not of bucket {crop.target}; leave out --skip_cache_check")
        if moments is None:
            return Sample(key, "", crop, weight, latents_4hw=latents, mask_1hw=mask)
        return Sample(key, "", crop, weight, moments_8hw=moments, mask_1hw=mask)

    def _beside(self, image: PlacedImage, row: Row, pictures: Pictures | None) -> tuple[Beside, ...]:
        """The image at all other resolutions that a cache still lacks; it comes along once an epoch.

        Only what has to be decoded on another scale is not cut from `pictures`, which are at the scale of `image`.
        """
        if self.latents is None or not self.latents.is_filling or row.repeat:
            return ()
        record = image.record
        decoded = {} if pictures is None else {decode_scale(record, image.placement.resized): pictures}
        waiting = {self.latents.number(other): other for other in self.table.rows_of(self._image_of(row))}
        waiting.pop(self.latents.number(row.image))
        beside = []
        for other in waiting.values():
            if self.latents.awaits(other):
                placement = self.table.placement(other)
                scale = decode_scale(record, placement.resized)
                if scale not in decoded:
                    decoded[scale] = read_pictures(record, placement.resized, with_control=False)
                plain = cut_plain(decoded[scale], record, placement)
                beside.append(Beside(other, plain.image, plain.mask))
        return tuple(beside)

    def _image_of(self, row: Row) -> int:
        return int(self.table.image_of[row.image])

    def _filler(self, work: Work) -> Sample:
        """A blank row of the right shape, for a rank none of whose own rows can be had. It carries no weight."""
        row = work.rows.rows[0]
        image = self.table[row.image]
        bucket = image.placement.bucket
        crop = crop_info(image.record.size, image.placement, flipped=False)
        blank_3HW = torch.zeros(3, bucket.h, bucket.w)
        cells = (bucket.h // CELL, bucket.w // CELL)
        shown: dict[str, Tensor] = {"pixels_3HW": blank_3HW}
        if self.latents is not None:
            shown = {"moments_8hw": torch.zeros(8, *cells)}
            if not self.latents.moments:
                shown = {"latents_4hw": torch.zeros(4, *cells)}
        return Sample(
            SampleKey(image.record.key, row.repeat),
            "",
            crop,
            0.0,
            control_3HW=None if image.record.control is None else blank_3HW,
            text=None if self.text is None else self.text.empty,
            **shown,
        )

    def _collate(self, samples: list[Sample], *, work: Work, num_real: int, failures: tuple[Skipped, ...]) -> Batch:
        ids = legacy_size_ids if self.legacy_crop else size_ids
        awaited = [sample for sample in samples if sample.awaits is not None]
        weights = [sample.weight for sample in samples[:num_real]] + [0.0] * (len(samples) - num_real)
        return Batch(
            keys=[sample.key for sample in samples],
            num_real=num_real,
            weight_B=torch.tensor(weights, dtype=torch.float32),
            captions=[sample.caption for sample in samples],
            sizes_B6=torch.tensor([ids(sample.crop) for sample in samples], dtype=torch.float32),
            bucket=work.rows.bucket,
            pixels_B3HW=_stack([sample.pixels_3HW for sample in awaited or samples]),
            latents_B4hw=_stack(_rows_of("latents_4hw", samples)),
            moments_B8hw=_stack(_rows_of("moments_8hw", samples)),
            awaits=tuple(sample.awaits for sample in samples) if awaited else (),
            beside=tuple(picture for sample in samples[:num_real] for picture in sample.beside),
            mask_B1hw=_masks(samples, work.rows.bucket),
            control_B3HW=_stack([sample.control_3HW for sample in samples]),
            text=TextCond.cat(texts) if (texts := [s.text for s in samples if s.text is not None]) else None,
            failures=failures,
        )


def _masks(samples: list[Sample], bucket: Size) -> Tensor | None:
    """Masks of all rows when any row has one; a row without one counts everywhere."""
    if all(sample.mask_1hw is None for sample in samples):
        return None
    ones_1hw = torch.ones(1, bucket.h // CELL, bucket.w // CELL)
    return torch.stack([ones_1hw if sample.mask_1hw is None else sample.mask_1hw for sample in samples])


def _rows_of(name: str, samples: Sequence[Sample]) -> list[Tensor]:
    """The tensors of this name, zeros for samples that are still to be encoded; none when no sample has one."""
    rows = [getattr(sample, name) for sample in samples]
    shapes = {row.shape for row in rows if row is not None}
    return [torch.zeros(shape) if row is None else row for shape in shapes for row in rows]


def _stack(rows: Sequence[Tensor | None]) -> Tensor | None:
    there = [row for row in rows if row is not None]
    return torch.stack(there) if there else None
