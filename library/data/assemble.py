"""From data set descriptions to placed images: scan each subset, name each image, choose its bucket."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace

from library.config.dataset_file import DatasetSpec
from library.data.batching import Pool, Row
from library.data.buckets import BucketPolicy, UnplaceableImage
from library.data.types import ImageRecord, PlacedImage, ScanReport, Skipped
from library.errors import UserError
from library.plugins import load_plugin

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
    """Every usable image of every data set, in the order of the descriptions, and what was left out.

    Within a data set the regularisation images come last, with the repeats that `balance` gives them.
    """
    if not any(spec.subsets for spec in specs):
        raise UserError(
            "there are no images to train on", where="the data set", fix="give --train_data_dir or --dataset_config"
        )
    report = ScanReport()
    images: list[PlacedImage] = []
    seen: Counter[str] = Counter()
    for index, spec in enumerate(specs):
        _check_resolution(spec)
        placed = list(_place(spec, index, report=report, seen=seen))
        training = [image for image in placed if not image.record.subset.is_reg]
        needed, unused = balance(
            [image for image in placed if image.record.subset.is_reg],
            num_train_images=sum(image.record.repeats for image in training),
        )
        images += training + needed
        report.unused_reg += unused
    return images, report


def _place(spec: DatasetSpec, index: int, *, report: ScanReport, seen: Counter[str]) -> Iterator[PlacedImage]:
    """The usable images of one data set, subset by subset."""
    policy = policy_of(spec)
    for subset in spec.subsets:
        source = load_plugin("library.data.sources", subset.source)
        for record in source.scan(subset, report=report):
            try:
                placement = policy.place(record.size)
            except UnplaceableImage as reason:
                report.skipped.append(Skipped(record.path, str(reason)))
                continue
            yield PlacedImage(_unique(record, seen), placement, index)


def balance(reg: Sequence[PlacedImage], *, num_train_images: int) -> tuple[list[PlacedImage], list[PlacedImage]]:
    """The regularisation images with their repeats for an epoch, and those that are not needed.

    Images are taken in order, each as often as its subset says, until they are as many as the training images
    (repeats included); as long as they are fewer, each gets one repeat more, in order (dataset_config.md §4).
    """
    repeats: list[int] = []
    total = 0
    for image in reg:
        if total >= num_train_images:
            break
        repeats.append(image.record.repeats)
        total += image.record.repeats
    missing = max(num_train_images - total, 0)
    if repeats:
        rounds, rest = divmod(missing, len(repeats))
        repeats = [count + rounds + (position < rest) for position, count in enumerate(repeats)]
    needed = [
        replace(image, record=replace(image.record, repeats=count))
        for image, count in zip(reg[: len(repeats)], repeats, strict=True)
    ]
    return needed, list(reg[len(repeats) :])


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
