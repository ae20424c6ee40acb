"""What a run would train on, image by image, and what is wrong with it. Needs no torch.

Captions, crops and mirrorings are the ones that training draws for an epoch: the same draws, from the same seed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from library.config.dataset_file import DatasetSpec
from library.data.assemble import assemble
from library.data.batching import Pool, epoch_plan
from library.data.buckets import enlargement
from library.data.captions import has_one_wording
from library.data.epochs import EpochPools
from library.data.face_crop import face_of
from library.data.fit_report import HEAVY_CROP
from library.data.looking import Look, identical_files, look_at
from library.data.near_duplicates import groups_alike
from library.data.records import ImageRecord, ScanReport
from library.data.report import DataSummary, summarise
from library.data.sample_draws import Visit, draw_sample
from library.data.table import ImageTable
from library.data.token_counts import CountTokens, TokenSummary, count_texts, token_lengths
from library.diffusion.crops import CropInfo, SizeIds, legacy_size_ids, size_ids
from library.sizes import Size

FAR_TOO_SMALL = 1.5
"""Factor; an image whose sides grow by as much trains a blurred picture."""

KINDS = {
    "unreadable": "unreadable images, left out of training",
    "unreadable_mask": "unreadable masks",
    "no_caption": "no caption: trained with an empty one",
    "empty_caption": "empty captions",
    "cut_caption": "captions that lose text",
    "over_limit": "over bucket_max_crop or bucket_max_upscale: no bucket keeps them",
    "too_small": f"enlarged {FAR_TOO_SMALL:g} times or more to fill the bucket",
    "cropped": f"more than {HEAVY_CROP:.0%} of the pixels cropped away",
    "duplicate": "the same file as another image",
    "near_duplicate": "looks like another image",
}
"""Every kind of problem, in the order in which they are shown, with its title."""


@dataclass(frozen=True)
class InspectionSettings:
    """What is shown and by which rules; the fields mean what they mean in a training run.

    `epoch` counts from 0. `count_tokens` gives lengths without a limit. `is_cached` says that latents are cached.
    `world` is the number of processes. `cache_dir` holds the indexes of the image folders, where they have a place of
    their own. `num_variants` is how many wordings of a caption are cached. `thumbnails` is how many pictures are kept
    for a page.
    """

    count_tokens: CountTokens
    seed: int = 0
    epoch: int = 0
    max_token_length: int = 75
    legacy_crop: bool = False
    is_cached: bool = False
    world: int = 1
    accumulation: int = 1
    max_train_steps: int = 1600
    max_train_epochs: int | None = None
    cache_dir: Path | None = None
    num_variants: int = 1
    thumbnails: int = 0


class Problem(NamedTuple):
    """One thing to look at: its kind (a key of KINDS), the image, a sentence, and the image that it is like."""

    kind: str
    path: str
    what: str
    other: str | None = None


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """One image at its first visit in the epoch. `caption` is as it is tokenised, `tokens` its length.

    `dataset` is the index of its data set, `spec`. `longest` is the number of tokens of the longest wording that
    training may make of the caption.
    """

    record: ImageRecord
    dataset: int
    spec: DatasetSpec
    crop: CropInfo
    size_ids: SizeIds
    caption: str
    tokens: int
    longest: int

    @property
    def bucket(self) -> Size:
        """The size that is trained on."""
        return self.crop.target

    @property
    def is_over_limit(self) -> bool:
        """Whether the data set's limits on crop and enlargement could not be kept."""
        crop, upscale = self.spec.bucket_max_crop, self.spec.bucket_max_upscale
        grown = enlargement(self.crop.original, self.bucket)
        return (crop is not None and self.cropped_share > crop) or (upscale is not None and grown > upscale)

    @property
    def upscale(self) -> float:
        """The factor by which the sides grow (above 1) or shrink."""
        return max(self.crop.resized.w / self.crop.original.w, self.crop.resized.h / self.crop.original.h)

    @property
    def cropped_share(self) -> float:
        """The share of the pixels that is cut away, 0 to 1."""
        return 1 - self.bucket.area / self.crop.resized.area


@dataclass
class Inspection:
    """Everything a report shows. `looks` has one item per image; `thumbnails` are positions that have a picture.

    `identical` and `alike` are groups of positions: files of equal content, and pictures that look like the first.
    """

    settings: InspectionSettings
    summary: DataSummary
    images: list[ImageFacts]
    looks: list[Look]
    identical: list[list[int]]
    alike: list[list[int]]
    problems: list[Problem] = field(default_factory=list)

    @property
    def counts(self) -> dict[str, int]:
        """The number of problems of each kind that there is."""
        counts = {kind: sum(problem.kind == kind for problem in self.problems) for kind in KINDS}
        return {kind: count for kind, count in counts.items() if count}


def inspect(specs: Sequence[DatasetSpec], settings: InspectionSettings) -> Inspection:
    """Scan the data sets as training does, and look at every picture that it trains on once.

    Held-out images are counted in the summary only. Raises UserError as a training run does.
    """
    whole, scan_report = assemble(specs, seed=settings.seed, cache_dir=settings.cache_dir)
    table = whole.part(validation=False)
    images = _facts(table, specs, settings)
    records = [image.record for image in images]
    some = _likely_wanted(images, scan_report, settings)
    looks = look_at(records, with_thumbnail=some)
    summary = _summary(specs, table, scan_report, [image.longest for image in images], settings)
    inspection = Inspection(settings, summary, images, looks, *_duplicates(records, looks))
    kinds = list(KINDS)
    found = dict.fromkeys(_problems(inspection, scan_report))  # a file of two data sets has some problems only once
    inspection.problems = sorted(found, key=lambda problem: kinds.index(problem.kind))
    _complete_thumbnails(inspection)
    return inspection


def _facts(table: ImageTable, specs: Sequence[DatasetSpec], settings: InspectionSettings) -> list[ImageFacts]:
    """The images that the epoch serves, in scan order."""
    pools = EpochPools(table, specs, seed=settings.seed)
    first = _steps_of_epochs(pools, range(settings.epoch), settings)
    length = settings.max_train_steps
    if settings.max_train_epochs:
        length = _steps_of_epochs(pools, range(settings.max_train_epochs), settings)
    draws = []
    rows = sorted(_steps_of_rows(pools.pools(settings.epoch), settings).items())
    for row, step in rows:
        image, visit = table[row], Visit(settings.epoch, step=first + step)
        draws.append(
            draw_sample(
                image,
                visit,
                seed=settings.seed,
                total_steps=length,
                is_cached=settings.is_cached,
                num_variants=1 if has_one_wording(image.record.subset) else settings.num_variants,
            )
        )
    tokens = count_texts({draw.caption for draw in draws}, settings.count_tokens)
    longest = dict(zip(table.images.tolist(), token_lengths(table, settings.count_tokens).tolist(), strict=True))
    ids = legacy_size_ids if settings.legacy_crop else size_ids
    return [
        ImageFacts(
            record=table.record(int(table.image_of[row])),
            dataset=int(table.dataset_of[row]),
            spec=specs[int(table.dataset_of[row])],
            crop=draw.crop,
            size_ids=ids(draw.crop),
            caption=draw.caption,
            tokens=tokens[draw.caption],
            longest=longest[int(table.image_of[row])],
        )
        for (row, _), draw in zip(rows, draws, strict=True)
    ]


def _steps_of_epochs(pools: EpochPools, epochs: Iterable[int], settings: InspectionSettings) -> int:
    """Optimizer steps of several epochs together."""
    return sum(-(-pools.micro_batches(epoch, world=settings.world) // settings.accumulation) for epoch in epochs)


def _steps_of_rows(pools: Sequence[Pool], settings: InspectionSettings) -> Mapping[int, int]:
    """Row of the table -> optimizer step of the epoch at which its first repeat is used."""
    plan = epoch_plan(
        pools, world=settings.world, accumulation=settings.accumulation, seed=settings.seed, epoch=settings.epoch
    )
    return {
        row.image: step for step in range(len(plan)) for micro in plan[step] for row in micro.rows if row.repeat == 0
    }


def _summary(
    specs: Sequence[DatasetSpec],
    table: ImageTable,
    scan_report: ScanReport,
    longest: Sequence[int],
    settings: InspectionSettings,
) -> DataSummary:
    limit = settings.max_token_length
    cut = sum(length > limit for length in longest)
    tokens = TokenSummary(captions=len(longest), cut=cut, longest=max(longest, default=0), limit=limit)
    return summarise(specs, table, scan_report=scan_report, tokens=tokens)


def _duplicates(records: Sequence[ImageRecord], looks: Sequence[Look]) -> tuple[list[list[int]], list[list[int]]]:
    """Groups of identical files, and groups of other pictures that look alike; a file counts once."""
    first_of: dict[str, int] = {}
    for position, record in enumerate(records):
        if looks[position].error is None:
            first_of.setdefault(record.path, position)
    identical = [
        group for group in identical_files([record.path for record in records]) if looks[group[0]].error is None
    ]
    again = {position for group in identical for position in group[1:]}
    positions = [position for position in first_of.values() if position not in again]
    layouts = np.array([looks[position].colours for position in positions], dtype=np.uint8).reshape(len(positions), -1)
    alike = groups_alike([looks[position].hash for position in positions], layouts)
    return identical, [[positions[member] for member in group] for group in alike]


def _problems(inspection: Inspection, scan_report: ScanReport) -> Iterator[Problem]:
    """All problems, those of one kind in scan order."""
    images, looks = inspection.images, inspection.looks
    yield from (Problem("unreadable", path, reason) for path, reason in scan_report.skipped)
    for image, look in zip(images, looks, strict=True):
        if look.error is not None:
            yield Problem("unreadable", image.record.path, look.error)
    for image, look in zip(images, looks, strict=True):
        if look.mask_error is not None:
            yield Problem("unreadable_mask", image.record.path, f"{image.record.mask}: {look.mask_error}")
    missing = set(scan_report.missing_captions)
    yield from (Problem("no_caption", path, "there is no caption file") for path in scan_report.missing_captions)
    for image in images:
        if not image.record.caption.strip() and image.record.path not in missing:
            yield Problem("empty_caption", image.record.path, "the caption is empty")
    yield from (problem for image in images for problem in _caption_and_fit(image, inspection.settings))
    for group in inspection.identical:
        first = images[group[0]].record.path
        yield from (Problem("duplicate", images[i].record.path, f"the same file as {first}", first) for i in group[1:])
    for group in inspection.alike:
        first = images[group[0]].record.path
        yield from (Problem("near_duplicate", images[i].record.path, f"looks like {first}", first) for i in group[1:])


def _caption_and_fit(image: ImageFacts, settings: InspectionSettings) -> Iterator[Problem]:
    path, limit = image.record.path, settings.max_token_length
    if image.longest > limit:
        yield Problem(
            "cut_caption", path, f"{image.longest} tokens, of which the last {image.longest - limit} are lost"
        )
    if image.is_over_limit:
        what = f"{image.cropped_share:.1%} cropped, enlarged {max(1, image.upscale):.2f} times, in {image.bucket}"
        yield Problem("over_limit", path, what)
    if image.upscale >= FAR_TOO_SMALL:
        yield Problem(
            "too_small", path, f"{image.record.size} is enlarged {image.upscale:.2f} times to fill {image.bucket}"
        )
    if image.cropped_share > HEAVY_CROP and face_of(image.record) is None:  # a face is cut out on purpose
        yield Problem(
            "cropped", path, f"{image.cropped_share:.0%} of {image.crop.resized} is cut away for {image.bucket}"
        )


def _likely_wanted(images: Sequence[ImageFacts], scan_report: ScanReport, settings: InspectionSettings) -> set[int]:
    """Positions whose thumbnails are made on the first look; what it discovers is added by `_complete_thumbnails`."""
    missing = set(scan_report.missing_captions)

    def is_calm(position: int) -> bool:
        image = images[position]
        return image.record.path not in missing and not any(_caption_and_fit(image, settings))

    return set(sorted(range(len(images)), key=is_calm)[: settings.thumbnails])


def _complete_thumbnails(inspection: Inspection) -> None:
    """Let the images with problems have the thumbnails, and of those as many of the others as there may be."""
    paths = {path for problem in inspection.problems for path in (problem.path, problem.other)}
    images, looks = inspection.images, inspection.looks
    order = sorted(range(len(images)), key=lambda i: images[i].record.path not in paths)
    wanted = [i for i in order if looks[i].error is None][: inspection.settings.thumbnails]
    absent = [i for i in wanted if looks[i].thumbnail is None]
    fresh = look_at([images[i].record for i in absent], with_thumbnail=range(len(absent)))
    for position, look in zip(absent, fresh, strict=True):
        looks[position] = look
    if len(wanted) == inspection.settings.thumbnails:
        for position in set(range(len(looks))) - set(wanted):
            if looks[position].thumbnail is not None:
                looks[position] = _without_picture(looks[position])


def _without_picture(look: Look) -> Look:
    return Look(look.error, look.hash, look.colours, None, None, look.mask_error)
