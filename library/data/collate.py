"""Builds batches, in the main process or in data loader workers, from picklable parts only.

Every random draw of a sample is seeded by (run seed, purpose, epoch, record, repeat), so a batch does not depend on
which worker builds it or on what was built before.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from library.data.batching import RankRows, Row
from library.data.captions import process_caption
from library.data.pixels import load_sample, to_pixels
from library.data.records import READ_ERRORS, PlacedImage, Skipped
from library.data.stores import LatentStore, TextStore
from library.data.table import ImageTable
from library.data.transforms import apply_crop, crop_info, read_record
from library.data.types import Awaited, Batch, SampleKey
from library.diffusion.conditioning import TextCond
from library.diffusion.crops import CropInfo, legacy_size_ids, size_ids
from library.seeds import derive_seed


class Work(NamedTuple):
    """One batch to build: a rank's rows of a micro-batch, the epoch and the optimizer step of the run (from 0)."""

    epoch: int
    rows: RankRows
    step: int = 0


@dataclass(frozen=True, slots=True)
class Sample:
    """One finished row; exactly one of `pixels_3HW`, `latents_4hw` and `moments_8hw` is set.

    `awaits` is set when the pixels, of the plain image, are there to be encoded for the cache first.
    """

    key: SampleKey
    caption: str
    crop: CropInfo
    weight: float
    pixels_3HW: Tensor | None = None
    latents_4hw: Tensor | None = None
    moments_8hw: Tensor | None = None
    text: TextCond | None = None
    awaits: Awaited | None = None


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
        record, subset = image.record, image.record.subset
        caption = process_caption(
            record.caption,
            subset,
            rng=self._rng("caption", epoch=epoch, image=image, row=row),
            epoch=epoch + 1,
            step=step,
            total_steps=self.total_steps,
        )
        flip = subset.flip_aug and self._rng("flip", epoch=epoch, image=image, row=row).random() < 0.5
        pixels = latents = None
        moments = awaits = None
        if self.latents is not None:
            crop = crop_info(record.size, image.placement, flipped=flip)
            if self.latents.awaits(row.image):
                awaits = Awaited(row.image, flip)
                picture = read_record(record, image.placement)
                plain = crop_info(record.size, image.placement, flipped=False)
                pixels = to_pixels(apply_crop(picture, plain, interpolation=subset.resize_interpolation))
            else:
                latents, moments = self._cached(row.image, flip)
        else:
            crop_rng = self._rng("crop", epoch=epoch, image=image, row=row) if subset.random_crop else None
            pixels, crop = load_sample(
                read_record(record, image.placement),
                image.placement,
                original=record.size,
                flip=flip,
                crop_rng=crop_rng,
                interpolation=subset.resize_interpolation,
            )
        text = None if self.text is None else self.text.get(self._image_of(row), empty=caption == "")
        key = SampleKey(record.key, row.repeat)
        return Sample(key, caption, crop, record.weight, pixels, latents, moments, text, awaits)

    def _cached(self, row: int, flip: bool) -> tuple[Tensor | None, Tensor | None]:
        """Latents or, where they are kept, the moments from which every epoch draws its own."""
        assert self.latents is not None
        cached = self.latents.get(row, flipped=flip)
        return (cached.latents_4hw, None) if cached.moments_8hw is None else (None, cached.moments_8hw)

    def _image_of(self, row: Row) -> int:
        return int(self.table.image_of[row.image])

    def _rng(self, purpose: str, *, epoch: int, image: PlacedImage, row: Row) -> random.Random:
        return random.Random(derive_seed(self.seed, purpose, epoch, image.record.key, row.repeat))

    def _filler(self, work: Work) -> Sample:
        """A blank row of the right shape, for a rank none of whose own rows can be had. It carries no weight."""
        row = work.rows.rows[0]
        image = self.table[row.image]
        bucket = image.placement.bucket
        crop = crop_info(image.record.size, image.placement, flipped=False)
        pixels = latents = moments = None
        if self.latents is not None and self.latents.moments:
            moments = torch.zeros(8, bucket.h // 8, bucket.w // 8)
        elif self.latents is not None:
            latents = torch.zeros(4, bucket.h // 8, bucket.w // 8)
        else:
            pixels = torch.zeros(3, bucket.h, bucket.w)
        text = None if self.text is None else self.text.empty
        return Sample(SampleKey(image.record.key, row.repeat), "", crop, 0.0, pixels, latents, moments, text)

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
            text=TextCond.cat(texts) if (texts := [s.text for s in samples if s.text is not None]) else None,
            failures=failures,
        )


def _rows_of(name: str, samples: Sequence[Sample]) -> list[Tensor]:
    """The tensors of this name, zeros for samples that are still to be encoded; none when no sample has one."""
    rows = [getattr(sample, name) for sample in samples]
    shapes = {row.shape for row in rows if row is not None}
    return [torch.zeros(shape) if row is None else row for shape in shapes for row in rows]


def _stack(rows: Sequence[Tensor | None]) -> Tensor | None:
    there = [row for row in rows if row is not None]
    return torch.stack(there) if there else None
