"""From data set descriptions to placed images: scan each subset, name each image, choose its bucket."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace

from library.config.dataset_file import DatasetSpec
from library.data.batching import Pool, Row
from library.data.buckets import BucketPolicy, UnplaceableImage
from library.data.sources import folders
from library.data.types import ImageRecord, PlacedImage, ScanReport, Skipped
from library.errors import UserError

ALIGNMENT = 32
"""Pixels: the latents of SDXL (1/8) are halved twice inside the U-Net."""


def policy_of(spec: DatasetSpec) -> BucketPolicy:
    """The bucketing rules of a data set."""
    return BucketPolicy(
        resolution=spec.resolution,
        enable_bucket=spec.enable_bucket,
        minimum=spec.min_bucket_reso,
        maximum=spec.max_bucket_reso,
        step=spec.bucket_reso_steps,
        no_upscale=spec.bucket_no_upscale,
    )


def assemble(specs: Sequence[DatasetSpec]) -> tuple[list[PlacedImage], ScanReport]:
    """Every usable image of every data set, in the order of the descriptions, and what was left out."""
    if not any(spec.subsets for spec in specs):
        raise UserError(
            "there are no images to train on", where="the data set", fix="give --train_data_dir or --dataset_config"
        )
    report = ScanReport()
    images: list[PlacedImage] = []
    seen: Counter[str] = Counter()
    for index, spec in enumerate(specs):
        _check_resolution(spec)
        policy = policy_of(spec)
        for subset in spec.subsets:
            for record in folders.scan(subset, report=report):
                try:
                    placement = policy.place(record.size)
                except UnplaceableImage as reason:
                    report.skipped.append(Skipped(record.path, str(reason)))
                    continue
                images.append(PlacedImage(_unique(record, seen), placement, index))
    return images, report


def _check_resolution(spec: DatasetSpec) -> None:
    """Buckets are aligned by their step; a resolution that is used as it is has to be aligned by the user."""
    if not spec.enable_bucket and (spec.resolution.w % ALIGNMENT or spec.resolution.h % ALIGNMENT):
        raise UserError(
            f"resolution {spec.resolution} is not a multiple of {ALIGNMENT} on both sides",
            where="resolution of a data set without enable_bucket",
            fix="choose such a resolution, or turn on enable_bucket",
        )


def group_into_pools(images: Sequence[PlacedImage], specs: Sequence[DatasetSpec]) -> list[Pool]:
    """Pools in ascending order of (data set, bucket); each image is in its pool once per repeat."""
    rows: defaultdict[tuple, list[Row]] = defaultdict(list)
    for index, image in enumerate(images):
        rows[image.dataset, image.placement.bucket] += [Row(index, repeat) for repeat in range(image.record.repeats)]
    return [
        Pool(dataset, bucket, specs[dataset].batch_size, tuple(rows[dataset, bucket]))
        for dataset, bucket in sorted(rows)
    ]


def _unique(record: ImageRecord, seen: Counter[str]) -> ImageRecord:
    """The record with a key that no earlier one has."""
    seen[record.key] += 1
    count = seen[record.key]
    return record if count == 1 else replace(record, key=f"{record.key}#{count}")
