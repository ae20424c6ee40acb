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
from library.data.buckets import BucketPolicy, Placement, UnplaceableImage
from library.data.bulk import no_garbage_collection
from library.data.companions import add_companions
from library.data.records import ImageRecord, PlacedImage, ScanReport, Skipped
from library.data.table import ImageTable
from library.data.validation import hold_out
from library.errors import UserError
from library.plugins import load_plugin
from library.sizes import Size

ALIGNMENT = 32
"""Pixels: the latents of SDXL (1/8) are halved twice inside the U-Net."""


def policies_of(spec: DatasetSpec) -> list[BucketPolicy]:
    """The bucketing rules of a data set, one for each of its resolutions."""
    return [_policy(spec, resolution) for resolution in spec.resolutions]


def _policy(spec: DatasetSpec, resolution: Size) -> BucketPolicy:
    return BucketPolicy(
        resolution=resolution,
        enable_bucket=spec.enable_bucket,
        minimum=spec.min_bucket_reso,
        maximum=spec.max_bucket_reso,
        step=spec.bucket_reso_steps,
        no_upscale=spec.bucket_no_upscale,
        selection=spec.bucket_selection,
        max_crop=spec.bucket_max_crop,
        max_upscale=spec.bucket_max_upscale,
    )


def assemble(
    specs: Sequence[DatasetSpec], *, seed: int = 0, cache_dir: Path | None = None
) -> tuple[ImageTable, ScanReport]:
    """Every usable image of every data set, in the order of the descriptions, and what was left out.

    Images for validation are marked (`seed` chooses those of a `validation_split` without a seed of its own).
    Within a data set the regularisation images come last, with the repeats that `balance` gives them. Indexes of the
    image folders lie below `cache_dir`, or each in its folder.
    """
    if not any(spec.subsets for spec in specs):
        raise UserError(
            "there are no images to train on", where="the data set", fix="give --train_data_dir or --dataset_config"
        )
    for spec in specs:
        _check_resolution(spec)
    report = ScanReport()
    with no_garbage_collection():
        table = ImageTable(_place_all(specs, report, cache_dir))
    hold_out(table, specs, seed=seed, report=report)
    balance_reg(table)
    return table, report


def _place_all(specs: Sequence[DatasetSpec], report: ScanReport, cache_dir: Path | None) -> Iterator[PlacedImage]:
    seen: Counter[str] = Counter()
    for index, spec in enumerate(specs):
        policies = policies_of(spec)
        for subset in sorted(spec.subsets, key=lambda subset: subset.is_reg):
            source = load_plugin("library.data.sources", subset.source)
            records = _records(source, subset, report=report, cache_dir=cache_dir)
            for record in add_companions(subset, records, report=report, cache_dir=cache_dir):
                placements, reasons = _placements(record, policies)
                if not placements:
                    report.skipped.append(Skipped(record.path, reasons[0]))
                    continue
                record = _unique(record, seen)
                for resolution, placement in placements:
                    yield PlacedImage(record, placement, index, resolution)


def _placements(record: ImageRecord, policies: Sequence[BucketPolicy]) -> tuple[list[tuple[int, Placement]], list[str]]:
    """Where an image goes at each resolution by its index, and why it has no place at the others."""
    placements, reasons = [], []
    for resolution, policy in enumerate(policies):
        try:
            placements.append((resolution, policy.place(record.size)))
        except UnplaceableImage as reason:
            reasons.append(str(reason))
    return placements, reasons


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
    is_used = table.is_live & (table.repeats > 0) & ~table.is_validation
    for dataset in np.unique(datasets[is_reg]).tolist():
        here = is_used & (datasets == dataset)
        reg = np.flatnonzero(here & is_reg)
        asked = [table.subset(image).num_repeats for image in reg.tolist()]
        table.repeats[reg] = balance(asked, num_train_images=int(table.repeats[here & ~is_reg].sum()))


def _check_resolution(spec: DatasetSpec) -> None:
    """Buckets are aligned by their step; a resolution that is used as it is has to be aligned by the user."""
    crooked = [size for size in spec.resolutions if size.w % ALIGNMENT or size.h % ALIGNMENT]
    if crooked and not spec.enable_bucket:
        raise UserError(
            f"resolution {crooked[0]} is not a multiple of {ALIGNMENT} on both sides",
            where="resolution of a data set without enable_bucket",
            fix="choose such a resolution, or turn on enable_bucket",
        )


def _unique(record: ImageRecord, seen: Counter[str]) -> ImageRecord:
    """The record with a key that no earlier one has."""
    seen[record.key] += 1
    count = seen[record.key]
    return record if count == 1 else replace(record, key=f"{record.key}#{count}")
