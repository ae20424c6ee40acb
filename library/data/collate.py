"""Builds batches, in the main process or in data loader workers, from picklable parts only.

Every random draw of a sample is seeded by (run seed, purpose, epoch, record, repeat), so a batch does not depend on
which worker builds it or on what was built before.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from library.data.batching import RankRows, Row
from library.data.captions import caption_variant, is_dropped, process_caption
from library.data.pixels import load_sample
from library.data.records import READ_ERRORS, PlacedImage, Skipped
from library.data.stores import LatentStore, TextStore
from library.data.table import ImageTable
from library.data.transforms import crop_info, read_record
from library.data.types import Batch, SampleKey
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
    """One finished row; exactly one of `pixels_3HW` and `latents_4hw` is set."""

    key: SampleKey
    caption: str
    crop: CropInfo
    weight: float
    pixels_3HW: Tensor | None = None
    latents_4hw: Tensor | None = None
    text: TextCond | None = None


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
        caption, variant = self._caption(image, row=row, epoch=epoch, step=step)
        flip = subset.flip_aug and self._rng("flip", epoch=epoch, image=image, row=row).random() < 0.5
        pixels = latents = None
        if self.latents is not None:
            latents = self.latents.get(row.image, flipped=flip)
            crop = crop_info(record.size, image.placement, flipped=flip)
        else:
            crop_rng = self._rng("crop", epoch=epoch, image=image, row=row) if subset.random_crop else None
            pixels, crop = load_sample(
                read_record(record),
                image.placement,
                flip=flip,
                crop_rng=crop_rng,
                interpolation=subset.resize_interpolation,
            )
        text = None
        if self.text is not None:
            text = self.text.get(self._image_of(row), variant=variant, empty=caption == "")
        return Sample(SampleKey(record.key, row.repeat), caption, crop, record.weight, pixels, latents, text)

    def _caption(self, image: PlacedImage, *, row: Row, epoch: int, step: int) -> tuple[str, int]:
        """The caption of one visit, and which of the cached wordings it is (0 without a cache)."""
        record, subset = image.record, image.record.subset
        rng = self._rng("caption", epoch=epoch, image=image, row=row)
        num_variants = 1 if self.text is None else self.text.num_variants(self._image_of(row))
        if num_variants == 1:
            wording = process_caption(
                record.caption, subset, rng=rng, epoch=epoch + 1, step=step, total_steps=self.total_steps
            )
            return wording, 0
        variant = self._rng("caption variant", epoch=epoch, image=image, row=row).randrange(num_variants)
        if is_dropped(subset, rng=rng, epoch=epoch + 1):
            return "", variant
        return caption_variant(record.caption, subset, key=record.key, number=variant), variant

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
        pixels = latents = None
        if self.latents is not None:
            latents = torch.zeros(4, bucket.h // 8, bucket.w // 8)
        else:
            pixels = torch.zeros(3, bucket.h, bucket.w)
        text = None if self.text is None else self.text.empty
        return Sample(SampleKey(image.record.key, row.repeat), "", crop, 0.0, pixels, latents, text)

    def _collate(self, samples: list[Sample], *, work: Work, num_real: int, failures: tuple[Skipped, ...]) -> Batch:
        ids = legacy_size_ids if self.legacy_crop else size_ids
        weights = [sample.weight for sample in samples[:num_real]] + [0.0] * (len(samples) - num_real)
        return Batch(
            keys=[sample.key for sample in samples],
            num_real=num_real,
            weight_B=torch.tensor(weights, dtype=torch.float32),
            captions=[sample.caption for sample in samples],
            sizes_B6=torch.tensor([ids(sample.crop) for sample in samples], dtype=torch.float32),
            bucket=work.rows.bucket,
            pixels_B3HW=_stack([sample.pixels_3HW for sample in samples]),
            latents_B4hw=_stack([sample.latents_4hw for sample in samples]),
            text=TextCond.cat(texts) if (texts := [s.text for s in samples if s.text is not None]) else None,
            failures=failures,
        )


def _stack(rows: list[Tensor | None]) -> Tensor | None:
    return None if rows[0] is None else torch.stack(rows)
