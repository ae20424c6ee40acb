"""What the data of a run amounts to: as text for the user, and as the ss_* metadata of network files."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from library.config.dataset_file import DatasetSpec, SubsetSpec
from library.data.types import PlacedImage, ScanReport, Skipped
from library.sizes import Size

LISTED = 5
"""How many names a list in the log holds before it is cut short."""


@dataclass(frozen=True)
class SubsetSummary:
    """One subset's images that are used."""

    image_dir: str
    images: int
    repeats: int
    class_tokens: str | None


@dataclass(frozen=True)
class DataSummary:
    """Counts of a whole run.

    `repeats` is the number of samples per epoch; `buckets` counts repeats too, `mean_ar_error` is over distinct images.
    """

    images: int
    repeats: int
    buckets: dict[Size, int]
    mean_ar_error: float
    skipped: tuple[Skipped, ...]
    missing_captions: tuple[str, ...]
    subsets: tuple[SubsetSummary, ...]

    def text(self) -> str:
        """Lines for the log: subsets, buckets, images left out, images without a caption."""
        lines = [f"{self.images} images, {self.repeats} samples per epoch (repeats included)"]
        lines += [f"  {s.image_dir}: {s.images} images x {s.repeats} repeats" for s in self.subsets]
        lines += [
            f"bucket {i}: resolution {tuple(size)}, count: {count}"
            for i, (size, count) in enumerate(self.buckets.items())
        ]
        lines.append(f"mean ar error (without repeats): {self.mean_ar_error:.6f}")
        if self.missing_captions:
            lines.append(f"{len(self.missing_captions)} images have no caption file and train with an empty caption:")
            lines += [f"  {path}" for path in self.missing_captions[:LISTED]]
            lines += _more(len(self.missing_captions))
        if self.skipped:
            lines.append(skipped_text(self.skipped))
        return "\n".join(lines)


def skipped_text(skipped: Sequence[Skipped]) -> str:
    """The images left out, with reasons; the first few by name."""
    lines = [f"{len(skipped)} images are left out:"]
    lines += [f"  {path}: {reason}" for path, reason in skipped[:LISTED]]
    return "\n".join(lines + _more(len(skipped)))


def _more(count: int) -> list[str]:
    return [f"  ... and {count - LISTED} more"] if count > LISTED else []


def summarise(specs: Sequence[DatasetSpec], images: Sequence[PlacedImage], *, scan_report: ScanReport) -> DataSummary:
    """Count what is trained on and what is not."""
    buckets: Counter[Size] = Counter()
    for image in images:
        buckets[image.placement.bucket] += image.record.repeats
    subsets = tuple(
        SubsetSummary(subset.image_dir, len(members), subset.num_repeats, subset.class_tokens)
        for index, spec in enumerate(specs)
        for subset in spec.subsets
        if (members := _members(images, index, subset))
    )
    return DataSummary(
        images=len(images),
        repeats=sum(buckets.values()),
        buckets=dict(sorted(buckets.items())),
        mean_ar_error=_mean_ar_error(images),
        skipped=tuple(scan_report.skipped),
        missing_captions=tuple(scan_report.missing_captions),
        subsets=subsets,
    )


def ss_metadata(
    specs: Sequence[DatasetSpec],
    images: Sequence[PlacedImage],
    *,
    batches_per_epoch: int,
    total_batch_factor: int,
    user_config: bool,
) -> dict[str, str]:
    """The data set part of a network's metadata; every value is text, structures are JSON (model_files.md §9).

    `user_config` chooses between the two forms that sd-scripts writes: a list of data sets, or the values of the
    single data set that the command line describes. `total_batch_factor` is ranks times accumulation.
    """
    datasets = [_dataset_info(spec, index, images) for index, spec in enumerate(specs)]
    common = {
        "ss_num_train_images": str(sum(image.record.repeats for image in images)),
        "ss_num_validation_images": "0",
        "ss_num_reg_images": "0",
        "ss_num_batches_per_epoch": str(batches_per_epoch),
    }
    dirs, tags = _merge_folders(specs, images)
    shared = {"ss_dataset_dirs": json.dumps(dirs), "ss_tag_frequency": json.dumps(tags)}
    if user_config:
        return common | shared | {"ss_datasets": json.dumps(datasets)}
    spec, info = specs[0], datasets[0]
    subset = spec.subsets[0]
    return (
        common
        | shared
        | {
            "ss_batch_size_per_device": str(spec.batch_size),
            "ss_total_batch_size": str(spec.batch_size * total_batch_factor),
            "ss_resolution": str(tuple(spec.resolution)),
            "ss_color_aug": "False",
            "ss_flip_aug": str(subset.flip_aug),
            "ss_random_crop": str(subset.random_crop),
            "ss_shuffle_caption": str(subset.shuffle_caption),
            "ss_enable_bucket": str(spec.enable_bucket),
            "ss_bucket_no_upscale": str(spec.bucket_no_upscale),
            "ss_min_bucket_reso": str(spec.min_bucket_reso),
            "ss_max_bucket_reso": str(spec.max_bucket_reso),
            "ss_keep_tokens": str(subset.keep_tokens),
            "ss_reg_dataset_dirs": "{}",
            "ss_bucket_info": json.dumps(info["bucket_info"]),
        }
    )


def _dataset_info(spec: DatasetSpec, index: int, images: Sequence[PlacedImage]) -> dict[str, object]:
    """One item of the `datasets` list."""
    members = [image for image in images if image.dataset == index]
    used = [(subset, _members(images, index, subset)) for subset in spec.subsets]
    return {
        "is_dreambooth": True,
        "batch_size_per_device": spec.batch_size,
        "num_train_images": sum(image.record.repeats for image in members),
        "num_reg_images": 0,
        "resolution": list(spec.resolution),
        "enable_bucket": spec.enable_bucket,
        "min_bucket_reso": spec.min_bucket_reso,
        "max_bucket_reso": spec.max_bucket_reso,
        "tag_frequency": {_basename(subset): _tag_frequency(group) for subset, group in used if group},
        "bucket_info": _bucket_info(spec, members),
        "resize_interpolation": spec.subsets[0].resize_interpolation,
        "subsets": [_subset_info(subset, len(group)) for subset, group in used if group],
    }


def _subset_info(subset: SubsetSpec, img_count: int) -> dict[str, object]:
    return {
        "img_count": img_count,
        "num_repeats": subset.num_repeats,
        "color_aug": False,
        "flip_aug": subset.flip_aug,
        "random_crop": subset.random_crop,
        "shuffle_caption": subset.shuffle_caption,
        "keep_tokens": subset.keep_tokens,
        "keep_tokens_separator": subset.keep_tokens_separator,
        "secondary_separator": None,
        "enable_wildcard": False,
        "caption_prefix": subset.caption_prefix,
        "caption_suffix": subset.caption_suffix,
        "resize_interpolation": subset.resize_interpolation,
        "image_dir": _basename(subset),
        "class_tokens": subset.class_tokens,
        "is_reg": False,
    }


def _merge_folders(
    specs: Sequence[DatasetSpec], images: Sequence[PlacedImage]
) -> tuple[dict[str, dict[str, int]], dict[str, dict[str, int]]]:
    """`dataset_dirs` and `tag_frequency` over all data sets.

    Folders of the same name are told apart in the first (" (2)" and so on); in the second a name counts once, since
    the same folder used at several resolutions holds the same captions.
    """
    dirs: dict[str, dict[str, int]] = {}
    tags: dict[str, dict[str, int]] = {}
    for index, spec in enumerate(specs):
        for subset in spec.subsets:
            group = _members(images, index, subset)
            if not group:
                continue
            base = name = _basename(subset)
            number = 2
            while name in dirs:
                name = f"{base} ({number})"
                number += 1
            dirs[name] = {"n_repeats": subset.num_repeats, "img_count": len(group)}
            tags.setdefault(base, _tag_frequency(group))
    return dirs, tags


def _bucket_info(spec: DatasetSpec, images: Sequence[PlacedImage]) -> dict[str, object] | None:
    if not spec.enable_bucket:
        return None
    counts: Counter[Size] = Counter()
    for image in images:
        counts[image.placement.bucket] += image.record.repeats
    buckets = {i: {"resolution": list(size), "count": counts[size]} for i, size in enumerate(sorted(counts))}
    return {"buckets": buckets, "mean_img_ar_error": _mean_ar_error(images)}


def _mean_ar_error(images: Sequence[PlacedImage]) -> float:
    return sum(abs(image.placement.ar_error) for image in images) / len(images) if images else 0.0


def _tag_frequency(images: Sequence[PlacedImage]) -> dict[str, int]:
    tags: Counter[str] = Counter()
    for image in images:
        tags.update(tag for part in image.record.caption.split(",") if (tag := part.strip().lower()))
    return dict(tags)


def _members(images: Sequence[PlacedImage], dataset: int, subset: SubsetSpec) -> list[PlacedImage]:
    return [image for image in images if image.dataset == dataset and image.record.subset is subset]


def _basename(subset: SubsetSpec) -> str:
    return Path(subset.image_dir).name
