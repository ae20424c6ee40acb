"""What the data of a run amounts to: as text for the user, and as the ss_* metadata of network files."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from library.config.dataset_file import DatasetSpec, SubsetSpec
from library.data.assemble import policies_of
from library.data.epochs import row_shares
from library.data.face_crop import face_in_name
from library.data.fit_report import FitSummary, summarise_fits
from library.data.records import ScanReport, Skipped
from library.data.table import ImageTable
from library.data.token_counts import TokenSummary
from library.sizes import Size

LISTED = 5
"""How many names a list in the log holds before it is cut short."""

TEXTS_AT_ONCE = 4096


@dataclass(frozen=True)
class SubsetSummary:
    """One subset's images that are used; `repeats` as the subset asks for them.

    `place` is its folder or metadata file, `samples` how many visits they make in an epoch.
    """

    place: str
    images: int
    repeats: int
    class_tokens: str | None
    is_reg: bool
    samples: int

    def line(self) -> str:
        """One line for the log; regularisation images have no repeats in common."""
        if self.is_reg:
            return f"  {self.place}: {self.images} regularisation images, {self.samples} samples per epoch"
        return f"  {self.place}: {self.images} images x {self.repeats} repeats"


@dataclass(frozen=True)
class DataSummary:
    """Counts of a whole run.

    `repeats` is the number of samples per epoch, regularisation included; `buckets` counts repeats too,
    `mean_ar_error` is over distinct images. `num_train_images` and `num_reg_images` are those of the metadata: samples
    of training images, and regularisation images times the repeats that their folder asks for.
    `masked` images have a loss mask, `held_out` ones are for validation; `splits` says that a share of them was asked
    for. `tokens` is there when captions were counted. `fits` has one item per data set and resolution.
    `faceless` images are cropped as usual although their subset follows faces: their names tell of none.
    `is_expectation`: visits choose between resolutions, so `buckets` holds what an epoch has on average, rounded.
    """

    images: int
    repeats: int
    buckets: dict[Size, int]
    mean_ar_error: float
    skipped: tuple[Skipped, ...]
    missing_captions: tuple[str, ...]
    subsets: tuple[SubsetSummary, ...]
    num_train_images: int
    num_reg_images: int
    unused_reg: int
    masked: int = 0
    faceless: int = 0
    held_out: int = 0
    splits: bool = False
    tokens: TokenSummary | None = None
    fits: tuple[FitSummary, ...] = ()
    is_expectation: bool = False

    def text(self) -> str:
        """Lines for the log: subsets, buckets, images left out, images without a caption."""
        lines = [f"{self.images} images, {self.repeats} samples per epoch (repeats included)"]
        lines += [subset.line() for subset in self.subsets]
        if self.unused_reg:
            lines.append(f"{self.unused_reg} regularisation images are not used: there are fewer training images")
        if self.held_out or self.splits:
            too_few = "" if self.held_out else ": there are too few for validation_split"
            lines.append(f"{self.held_out} images held out for validation{too_few}")
        if self.masked:
            lines.append(f"{self.masked} images have a loss mask")
        if self.faceless:
            lines.append(self.faceless_line())
        about = "on average, " if self.is_expectation else ""
        lines += [
            f"bucket {i}: resolution {tuple(size)}, {about}count: {count}"
            for i, (size, count) in enumerate(self.buckets.items())
        ]
        lines.append(f"mean ar error (without repeats): {self.mean_ar_error:.6f}")
        for fit in self.fits:
            prefix = f"{fit.title}: " if fit.title else ""
            lines += [line if line.startswith(" ") else f"{prefix}{line}" for line in fit.lines()]
        if self.tokens:
            lines.append(self.tokens.text())
        if self.missing_captions:
            lines.append(f"{len(self.missing_captions)} images have no caption and train with an empty one:")
            lines += [f"  {path}" for path in self.missing_captions[:LISTED]]
            lines += _more(len(self.missing_captions))
        if self.skipped:
            lines.append(skipped_text(self.skipped))
        return "\n".join(lines)

    def faceless_line(self) -> str:
        """A sentence for the images whose names tell of no face."""
        return f"{self.faceless} images have no face in their names (_cx_cy_w_h): face_crop_aug_range leaves them alone"


def skipped_text(skipped: Sequence[Skipped]) -> str:
    """The images left out, with reasons; the first few by name."""
    lines = [f"{len(skipped)} images are left out:"]
    lines += [f"  {path}: {reason}" for path, reason in skipped[:LISTED]]
    return "\n".join(lines + _more(len(skipped)))


def _more(count: int) -> list[str]:
    return [f"  ... and {count - LISTED} more"] if count > LISTED else []


def summarise(
    specs: Sequence[DatasetSpec], table: ImageTable, *, scan_report: ScanReport, tokens: TokenSummary | None = None
) -> DataSummary:
    """Count what is trained on and what is not."""
    rows, shares = table.rows, row_shares(table, specs)
    subsets = tuple(
        SubsetSummary(
            group.subset.place,
            len(group.used),
            group.subset.num_repeats,
            group.subset.class_tokens,
            group.subset.is_reg,
            int(table.repeats[group.used].sum()),
        )
        for group in _groups(specs, table)
        if len(group.used)
    )
    return DataSummary(
        images=len(table.images),
        repeats=int(table.repeats[table.images].sum()),
        buckets=_bucket_counts(table, rows, shares),
        mean_ar_error=_mean_ar_error(table, rows, shares),
        skipped=tuple(scan_report.skipped),
        missing_captions=tuple(scan_report.missing_captions),
        subsets=subsets,
        num_train_images=_num_train_images(table, table.images),
        num_reg_images=_num_reg_images(table, np.flatnonzero(table.is_live)),
        held_out=table.num_held_out,
        splits=any(spec.validation_split for spec in specs),
        masked=sum(len(group.used) for group in _groups(specs, table) if group.subset.has_masks),
        faceless=_num_faceless(table),
        unused_reg=int((table.is_live & table.is_reg & (table.repeats == 0)).sum()),
        tokens=tokens,
        fits=tuple(_fits(specs, table)),
        is_expectation=bool((shares[rows] < 1).any()),
    )


def _fits(specs: Sequence[DatasetSpec], table: ImageTable) -> Iterator[FitSummary]:
    """One for each data set and resolution."""
    rows = table.rows
    for index, spec in enumerate(specs):
        for resolution, policy in enumerate(policies_of(spec)):
            title = [f"data set {index + 1}"] if len(specs) > 1 else []
            title += [f"at {policy.resolution}"] if spec.other_resolutions else []
            here = (table.dataset_of[rows] == index) & (table.resolution_of[rows] == resolution)
            yield summarise_fits(table, rows[here], policy, title=" ".join(title))


def _num_faceless(table: ImageTable) -> int:
    follows = np.array([subset.face_crop_aug_range is not None for subset in table.subsets], dtype=bool)
    images = table.images[follows[table.subset_of[table.images]]].tolist()
    return sum(face_in_name(table.paths.text(image), Size(*table.sizes[image].tolist())) is None for image in images)


def _num_train_images(table: ImageTable, images: np.ndarray) -> int:
    return int(table.repeats[images[~table.is_reg[images]]].sum())


def _num_reg_images(table: ImageTable, images: np.ndarray) -> int:
    """As sd-scripts counts them: before they are balanced against the training images."""
    asked = np.array([subset.num_repeats if subset.is_reg else 0 for subset in table.subsets], dtype=np.int64)
    return int(asked[table.subset_of[images]].sum())


@dataclass(frozen=True)
class _Group:
    """The images of one subset: all that are there (regularisation images beyond need included), and those in use."""

    table: ImageTable
    dataset: int
    subset: SubsetSpec
    listed: np.ndarray
    used: np.ndarray

    @cached_property
    def tags(self) -> dict[str, int]:
        """How often each tag stands in the captions."""
        return _tag_frequency(self.table, self.listed)


def _groups(specs: Sequence[DatasetSpec], table: ImageTable) -> list[_Group]:
    numbers = {id(subset): number for number, subset in enumerate(table.subsets)}
    datasets = table.image_datasets
    groups = []
    for index, spec in enumerate(specs):
        for subset in spec.subsets:
            number = numbers.get(id(subset), -1)
            listed = np.flatnonzero(table.is_live & (table.subset_of == number) & (datasets == index))
            groups.append(_Group(table, index, subset, listed, listed[table.repeats[listed] > 0]))
    return groups


def ss_metadata(
    specs: Sequence[DatasetSpec],
    table: ImageTable,
    *,
    batches_per_epoch: int,
    total_batch_factor: int,
    user_config: bool,
) -> dict[str, str]:
    """The data set part of a network's metadata; every value is text, structures are JSON (model_files.md §9).

    `user_config` chooses between the two forms that sd-scripts writes: a list of data sets, or the values of the
    single data set that the command line describes. `total_batch_factor` is ranks times accumulation.
    Regularisation images that are not needed count among the images of their folder.
    """
    groups = [group for group in _groups(specs, table) if len(group.listed)]
    datasets = [
        _dataset_info(specs, table, index, [group for group in groups if group.dataset == index])
        for index, spec in enumerate(specs)
        if not all(subset.is_validation for subset in spec.subsets)
    ]
    common = {
        "ss_num_train_images": str(_num_train_images(table, table.images)),
        "ss_num_validation_images": str(table.num_held_out),
        "ss_num_reg_images": str(_num_reg_images(table, np.flatnonzero(table.is_live))),
        "ss_num_batches_per_epoch": str(batches_per_epoch),
    }
    dirs, tags = _merge_folders(groups)
    reg_dirs, _ = _merge_folders(groups, is_reg=True)
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
            "ss_color_aug": str(subset.color_aug),
            "ss_flip_aug": str(subset.flip_aug),
            "ss_random_crop": str(subset.random_crop),
            "ss_shuffle_caption": str(subset.shuffle_caption),
            "ss_enable_bucket": str(spec.enable_bucket),
            "ss_bucket_no_upscale": str(spec.bucket_no_upscale),
            "ss_min_bucket_reso": str(spec.min_bucket_reso),
            "ss_max_bucket_reso": str(spec.max_bucket_reso),
            "ss_keep_tokens": str(subset.keep_tokens),
            "ss_reg_dataset_dirs": json.dumps(reg_dirs),
            "ss_bucket_info": json.dumps(info["bucket_info"]),
        }
    )


def _dataset_info(
    specs: Sequence[DatasetSpec], table: ImageTable, index: int, groups: Sequence[_Group]
) -> dict[str, object]:
    """One item of the `datasets` list; of several resolutions it names the first, and the buckets of all."""
    spec = specs[index]
    here = table.image_datasets == index
    used = table.images[here[table.images]]
    return {
        "is_dreambooth": not any(subset.metadata_file for subset in spec.subsets),
        "batch_size_per_device": spec.batch_size,
        "num_train_images": _num_train_images(table, used),
        "num_reg_images": _num_reg_images(table, np.flatnonzero(here & table.is_live)),
        "resolution": list(spec.resolution),
        "enable_bucket": spec.enable_bucket,
        "min_bucket_reso": spec.min_bucket_reso,
        "max_bucket_reso": spec.max_bucket_reso,
        "tag_frequency": {_basename(group.subset): group.tags for group in groups},
        "bucket_info": _bucket_info(
            spec, table, table.rows[table.dataset_of[table.rows] == index], shares=row_shares(table, specs)
        ),
        "resize_interpolation": spec.subsets[0].resize_interpolation,
        "subsets": [_subset_info(group.subset, len(group.listed)) for group in groups],
    }


def _subset_info(subset: SubsetSpec, img_count: int) -> dict[str, object]:
    if subset.metadata_file:
        kind: dict[str, object] = {"metadata_file": _basename(subset)}
    else:
        kind = {"class_tokens": subset.class_tokens, "is_reg": subset.is_reg}
    return {
        "img_count": img_count,
        "num_repeats": subset.num_repeats,
        "color_aug": subset.color_aug,
        "flip_aug": subset.flip_aug,
        "random_crop": subset.random_crop,
        "shuffle_caption": subset.shuffle_caption,
        "keep_tokens": subset.keep_tokens,
        "keep_tokens_separator": subset.keep_tokens_separator,
        "secondary_separator": subset.secondary_separator,
        "enable_wildcard": subset.enable_wildcard,
        "caption_prefix": subset.caption_prefix,
        "caption_suffix": subset.caption_suffix,
        "resize_interpolation": subset.resize_interpolation,
        **({"image_dir": Path(subset.image_dir).name} if subset.image_dir else {}),
        **kind,
    }


def _merge_folders(
    groups: Sequence[_Group], *, is_reg: bool = False
) -> tuple[dict[str, dict[str, int]], dict[str, dict[str, int]]]:
    """`dataset_dirs` (or `reg_dataset_dirs`) and `tag_frequency` (of both) over all data sets.

    Folders of the same name are told apart in the first (" (2)" and so on); in the second a name counts once, since
    the same folder used at several resolutions holds the same captions.
    """
    dirs: dict[str, dict[str, int]] = {}
    tags: dict[str, dict[str, int]] = {}
    for group in groups:
        base = name = _basename(group.subset)
        if base not in tags:
            tags[base] = group.tags
        if group.subset.is_reg != is_reg:
            continue
        number = 2
        while name in dirs:
            name = f"{base} ({number})"
            number += 1
        dirs[name] = {"n_repeats": group.subset.num_repeats, "img_count": len(group.listed)}
    return dirs, tags


def _bucket_info(
    spec: DatasetSpec, table: ImageTable, rows: np.ndarray, *, shares: np.ndarray
) -> dict[str, object] | None:
    if not spec.enable_bucket:
        return None
    counts = _bucket_counts(table, rows, shares)
    buckets = {i: {"resolution": list(size), "count": count} for i, (size, count) in enumerate(counts.items())}
    return {"buckets": buckets, "mean_img_ar_error": _mean_ar_error(table, rows, shares)}


def _bucket_counts(table: ImageTable, rows: np.ndarray, shares: np.ndarray) -> dict[Size, int]:
    """Visits per epoch of each bucket, in ascending order; expected ones, rounded, where visits have a choice."""
    repeats = table.repeats[table.image_of[rows]] * shares[rows]
    per_placement = np.bincount(table.placement_of[rows], weights=repeats, minlength=len(table.placements))
    counts: defaultdict[Size, float] = defaultdict(float)
    for placement, count in zip(table.placements, per_placement.tolist(), strict=True):
        if count:
            counts[placement.bucket] += count
    return {bucket: round(count) for bucket, count in sorted(counts.items())}


def _mean_ar_error(table: ImageTable, rows: np.ndarray, shares: np.ndarray) -> float:
    errors = np.array([abs(placement.ar_error) for placement in table.placements], dtype=np.float64)
    return float(np.average(errors[table.placement_of[rows]], weights=shares[rows])) if len(rows) else 0.0


def _tag_frequency(table: ImageTable, images: np.ndarray) -> dict[str, int]:
    """The parts of captions; of the tags alone where a source keeps them apart."""
    parts: Counter[str] = Counter()
    numbers = images.tolist()
    for start in range(0, len(numbers), TEXTS_AT_ONCE):
        chunk = numbers[start : start + TEXTS_AT_ONCE]
        tags = [table.tags[image] for image in chunk]
        texts = [table.captions.text(image) if tag is None else tag for image, tag in zip(chunk, tags, strict=True)]
        parts.update(",".join(texts).split(","))
    frequency: Counter[str] = Counter()
    for part, count in parts.items():
        if tag := part.strip().lower():
            frequency[tag] += count
    return dict(frequency)


def _basename(subset: SubsetSpec) -> str:
    return Path(subset.place).name
