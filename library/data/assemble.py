"""From data set descriptions to placed images: scan each subset, name each image, choose its bucket."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from inspect import signature
from pathlib import Path
from types import ModuleType

import numpy as np

from library.config.dataset_file import DatasetSpec, SubsetSpec
from library.data.batching import Pool, Rows
from library.data.buckets import BucketPolicy, UnplaceableImage
from library.data.bulk import no_garbage_collection
from library.data.records import ImageRecord, PlacedImage, ScanReport, Skipped
from library.data.table import ImageTable
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
        selection=spec.bucket_selection,
        max_crop=spec.bucket_max_crop,
        max_upscale=spec.bucket_max_upscale,
    )


def assemble(specs: Sequence[DatasetSpec], *, cache_dir: Path | None = None) -> tuple[ImageTable, ScanReport]:
    """Every usable image of every data set, in the order of the descriptions, and what was left out.

    Sources that keep an index of what they read have it below `cache_dir`, without one beside the images.

    Within a data set the regularisation images come last, with the repeats that `balance` gives them.
    """
    if not any(spec.subsets for spec in specs):
        raise UserError(
            "there are no images to train on", where="the data set", fix="give --train_data_dir or --dataset_config"
        )
    for spec in specs:
        _check_resolution(spec)
    report = ScanReport()
    with no_garbage_collection():
        table = ImageTable(_place_all(specs, report, cache_dir=cache_dir))
    balance_reg(table)
    return table, report


def _place_all(specs: Sequence[DatasetSpec], report: ScanReport, *, cache_dir: Path | None) -> Iterator[PlacedImage]:
    seen: Counter[str] = Counter()
    for index, spec in enumerate(specs):
        policy = policy_of(spec)
        for subset in sorted(spec.subsets, key=lambda subset: subset.is_reg):
            source = load_plugin("library.data.sources", subset.source)
            for record in _records(source, subset, report=report, cache_dir=cache_dir):
                try:
                    placement = policy.place(record.size)
                except UnplaceableImage as reason:
                    report.skipped.append(Skipped(record.path, str(reason)))
                    continue
                yield PlacedImage(_unique(record, seen), placement, index)


def _records(
    source: ModuleType, subset: SubsetSpec, *, report: ScanReport, cache_dir: Path | None
) -> Iterable[ImageRecord]:
    """What a source lists; only one that keeps something has a use for the folder."""
    if "cache_dir" in signature(source.scan).parameters:
        return source.scan(subset, report=report, cache_dir=cache_dir)
    return source.scan(subset, report=report)


def balance(repeats: Sequence[int], *, num_train_images: int) -> list[int]:
    """How often each regularisation image is used in an epoch, given how often its subset asks for it.

    Images are taken in order, each as often as its subset says, until they are as many as the training images
    (repeats included); those that come later are not used (0). As long as they are fewer, each gets one repeat more,
    in order (dataset_config.md §4).
    """
    taken: list[int] = []
    total = 0
    for count in repeats:
        if total >= num_train_images:
            break
        taken.append(count)
        total += count
    missing = max(num_train_images - total, 0)
    if taken:
        rounds, rest = divmod(missing, len(taken))
        taken = [count + rounds + (position < rest) for position, count in enumerate(taken)]
    return taken + [0] * (len(repeats) - len(taken))


def balance_reg(table: ImageTable) -> None:
    """Set the repeats of the regularisation images of every data set to fit its training images.

    Those that are not used now stay unused: when this is done again after images were left out, they are in no cache.
    """
    is_reg, datasets = table.is_reg, table.image_datasets
    is_used = table.is_live & (table.repeats > 0)
    for dataset in np.unique(datasets[is_reg]).tolist():
        here = is_used & (datasets == dataset)
        reg = np.flatnonzero(here & is_reg)
        asked = [table.subset(image).num_repeats for image in reg.tolist()]
        table.repeats[reg] = balance(asked, num_train_images=int(table.repeats[here & ~is_reg].sum()))


def _check_resolution(spec: DatasetSpec) -> None:
    """Buckets are aligned by their step; a resolution that is used as it is has to be aligned by the user."""
    if not spec.enable_bucket and (spec.resolution.w % ALIGNMENT or spec.resolution.h % ALIGNMENT):
        raise UserError(
            f"resolution {spec.resolution} is not a multiple of {ALIGNMENT} on both sides",
            where="resolution of a data set without enable_bucket",
            fix="choose such a resolution, or turn on enable_bucket",
        )


def group_into_pools(table: ImageTable, specs: Sequence[DatasetSpec]) -> list[Pool]:
    """Pools in ascending order of (data set, bucket); each image is in its pool once per repeat."""
    rows = table.rows
    buckets = sorted({placement.bucket for placement in table.placements})
    number_of = {bucket: number for number, bucket in enumerate(buckets)}
    bucket_of = np.array([number_of[placement.bucket] for placement in table.placements], dtype=np.int64)
    pool_of = table.dataset_of[rows] * len(buckets) + bucket_of[table.placement_of[rows]]
    pools = []
    for number in np.unique(pool_of).tolist():
        dataset, bucket = divmod(number, len(buckets))
        members = rows[pool_of == number]
        repeats = table.repeats[table.image_of[members]]
        pools.append(Pool(dataset, buckets[bucket], specs[dataset].batch_size, Rows.repeated(members, repeats)))
    return pools


def _unique(record: ImageRecord, seen: Counter[str]) -> ImageRecord:
    """The record with a key that no earlier one has."""
    seen[record.key] += 1
    count = seen[record.key]
    return record if count == 1 else replace(record, key=f"{record.key}#{count}")
