"""From data set descriptions to placed images: scan each subset, name each image, choose its bucket."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from library.config.dataset_file import DatasetSpec, SubsetSpec
from library.data.batching import Pool, Row
from library.data.buckets import BucketPolicy, UnplaceableImage
from library.data.sources import folders
from library.data.types import ImageRecord, PlacedImage, ScanReport, Skipped
from library.errors import UserError
from library.log import get_logger

log = get_logger(__name__)


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
        policy = policy_of(spec)
        for subset in _distinct(spec):
            for record in folders.scan(subset, report=report):
                try:
                    placement = policy.place(record.size)
                except UnplaceableImage as reason:
                    report.skipped.append(Skipped(record.path, str(reason)))
                    continue
                images.append(PlacedImage(_unique(record, seen), placement, index))
    return images, report


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


def _distinct(spec: DatasetSpec) -> Iterator[SubsetSpec]:
    """The subsets that are used: the first of those with the same folder, and none without repeats."""
    folders_seen: set[Path] = set()
    for subset in spec.subsets:
        folder = Path(subset.image_dir).resolve()
        if subset.num_repeats < 1:
            log.warning("%s is not used: num_repeats is %d", subset.image_dir, subset.num_repeats)
        elif folder in folders_seen:
            log.warning("%s is listed twice in one data set; the later entry is not used", subset.image_dir)
        else:
            folders_seen.add(folder)
            yield subset
