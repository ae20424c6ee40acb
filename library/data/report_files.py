"""The report about a data set as text for the console and as JSON for programs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

from library.data.fit_report import HEAVY_CROP
from library.data.inspection import KINDS, ImageFacts, Inspection
from library.io.atomic import write_text

BAR = 40
"""Characters of the longest bar."""

LISTED = 20
"""Problems of one kind that are listed on the console; the files hold all."""

_SURROGATE = re.compile("[\ud800-\udfff]")


def report_text(inspection: Inspection) -> str:
    """The whole report as lines: subsets, buckets, fit, captions, problems."""
    settings = inspection.settings
    lines = [f"Dataset report: epoch {settings.epoch} (counted from 0), seed {settings.seed}", ""]
    for section in (_subsets, _buckets, _fit, _captions, _problems):
        lines += [*section(inspection), ""]
    return "\n".join(lines[:-1])


def _subsets(inspection: Inspection) -> Iterator[str]:
    summary = inspection.summary
    yield f"{summary.images} images, {summary.repeats} samples an epoch (repeats included)"
    yield from (subset.line() for subset in summary.subsets)
    if summary.held_out:
        yield f"  {summary.held_out} images are held out for validation and not shown"
    if summary.masked:
        yield f"  {summary.masked} images have a loss mask"
    if summary.faceless:
        yield f"  {summary.faceless_line()}"
    if summary.unused_reg:
        yield f"  {summary.unused_reg} regularisation images are not used: there are fewer training images"


def _buckets(inspection: Inspection) -> Iterator[str]:
    summary = inspection.summary
    yield f"Buckets ({len(summary.buckets)}), samples an epoch; mean aspect error {summary.mean_ar_error:.4f}"
    most = max(summary.buckets.values(), default=1)
    digits = len(str(most))
    for bucket, count in summary.buckets.items():
        yield f"  {bucket!s:>9}  {count:>{digits}}  {'#' * max(1, round(BAR * count / most))}"


def _fit(inspection: Inspection) -> Iterator[str]:
    images = inspection.images
    enlarged = [image.upscale for image in images if image.upscale > 1]
    cropped = sum(image.cropped_share > HEAVY_CROP for image in images)
    most = f" (at most {max(enlarged):.2f} times)" if enlarged else ""
    yield f"Fit: {len(enlarged)} images are enlarged{most}, {cropped} lose more than {HEAVY_CROP:.0%} to the crop"


def _captions(inspection: Inspection) -> Iterator[str]:
    images, tokens = inspection.images, inspection.summary.tokens
    assert tokens is not None
    yield f"Captions: {len({image.caption for image in images})} different ones in this epoch"
    yield f"  {tokens.text()}"
    dropped = sum(not image.caption and bool(image.record.caption.strip()) for image in images)
    if dropped:
        yield f"  {dropped} are dropped in this epoch"


def _problems(inspection: Inspection) -> Iterator[str]:
    if not inspection.problems:
        yield "Problems: none"
        return
    yield f"Problems ({len(inspection.problems)})"
    for kind, count in inspection.counts.items():
        yield f"  {KINDS[kind]} ({count})"
        found = [problem for problem in inspection.problems if problem.kind == kind]
        yield from (f"    {problem.path}: {problem.what}" for problem in found[:LISTED])
        if count > LISTED:
            yield f"    ... and {count - LISTED} more"


def write_report_json(inspection: Inspection, path: str | Path) -> None:
    """Write {"epoch", "seed", "images": [...], "problems": [...]}, one image or problem a line.

    Sizes are [w, h] and the crop is [left, top], in pixels of the resized image before mirroring; `size_ids` are
    (original h, w, crop top, left, target h, w) as the U-Net gets them.
    """
    looks_like = {problem.path: problem.other for problem in inspection.problems if problem.other is not None}
    images = [_image(image, looks_like) for image in inspection.images]
    problems = [problem._asdict() for problem in inspection.problems]
    head = f'{{"epoch": {inspection.settings.epoch}, "seed": {inspection.settings.seed}'
    body = f'{head},\n"images": {_lines(images)},\n"problems": {_lines(problems)}}}\n'
    write_text(path, body)


def _image(image: ImageFacts, looks_like: dict[str, str]) -> dict[str, object]:
    record, crop = image.record, image.crop
    return {
        "path": record.path,
        "bucket": list(image.bucket),
        "resized": list(crop.resized),
        "crop": [crop.left, crop.top],
        "size_ids": list(image.size_ids),
        "caption": image.caption,
        "tokens": image.tokens,
        "key": record.key,
        "dataset": image.dataset,
        "subset": record.subset.place,
        "is_reg": record.subset.is_reg,
        "original": list(crop.original),
        "flipped": crop.flipped,
        "repeats": record.repeats,
        "weight": record.weight,
        "upscale": round(image.upscale, 4),
        "cropped_share": round(image.cropped_share, 4),
        "source_caption": record.caption,
        "longest_tokens": image.longest,
        "mask": record.mask,
        "control": record.control,
        "near_duplicate_of": looks_like.get(record.path),
    }


def _lines(items: list[dict[str, object]]) -> str:
    rows = ",\n".join(to_json(item) for item in items)
    return f"[\n{rows}\n]" if rows else "[]"


def to_json(value: object) -> str:
    """JSON that can be written as UTF-8: halves of surrogate pairs, as in names that are not UTF-8, are escaped."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    return _SURROGATE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)
