"""The report about a data set as one HTML page that needs no other file: style, script and pictures are inside.

Tables and problems are plain HTML. The pictures are drawn by the page's script from data inside the page, a screenful
at a time. The page may load nothing and run no script but its own: a policy in its head says so.
"""

from __future__ import annotations

import base64
import hashlib
from collections import defaultdict
from collections.abc import Iterator
from html import escape
from pathlib import Path
from string import Template

from library.data.fit_report import HEAVY_CROP
from library.data.inspection import KINDS, ImageFacts, Inspection
from library.data.looking import Look
from library.data.report_files import to_json
from library.data.report_statistics import caption_lengths, repeated_captions, tag_frequencies
from library.io.atomic import write_text

LISTED = 500
"""Problems of one kind that the page lists; the JSON file holds all."""

GROUPS_SHOWN = 200
"""Groups of look-alikes that the page shows."""

TAGS_SHOWN = 80
CAPTIONS_SHOWN = 15

_TEMPLATE = Path(__file__).parent / "report_template"


def write_report_page(inspection: Inspection, path: str | Path) -> None:
    """Write the page, atomically."""
    write_text(path, report_page(inspection))


def report_page(inspection: Inspection) -> str:
    """The page as text that can be written as UTF-8."""
    style, script = (_read(name) for name in ("page.css", "page.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    settings, summary = inspection.settings, inspection.summary
    sections = {
        "tiles": _tiles(inspection),
        "subsets": _subsets(inspection),
        "buckets": _buckets(inspection),
        "lengths": _lengths(inspection),
        "tags": _tags(inspection),
        "captions": _captions(inspection),
        "problems": _problems(inspection),
        "alike": _alike(inspection),
    }
    page = Template(_read("page.html")).substitute(
        {name: "\n".join(lines) for name, lines in sections.items()},
        style=style,
        script=script,
        script_hash=digest,
        epoch=settings.epoch,
        seed=settings.seed,
        num_alike=len(inspection.identical) + len(inspection.alike),
        num_problems=len(inspection.problems),
        num_images=summary.images,
        data=_embedded(inspection),
    )
    return page.encode("utf-8", "backslashreplace").decode("utf-8")


def _read(name: str) -> str:
    return (_TEMPLATE / name).read_text(encoding="utf-8").strip()


def _tiles(inspection: Inspection) -> Iterator[str]:
    summary = inspection.summary
    assert summary.tokens is not None
    tiles = [
        (f"{summary.images:,}", "images"),
        (f"{summary.repeats:,}", "samples an epoch"),
        (f"{len(summary.buckets):,}", "buckets"),
        (f"{summary.tokens.longest:,}", f"tokens at most, limit {summary.tokens.limit}"),
        (f"{len(inspection.problems):,}", "things to look at"),
    ]
    yield from (f"<div class=tile><b>{number}</b><span>{label}</span></div>" for number, label in tiles)


def _subsets(inspection: Inspection) -> Iterator[str]:
    for subset in inspection.summary.subsets:
        kind = "regularisation" if subset.is_reg else "training"
        repeats = "" if subset.is_reg else f"{subset.repeats}"
        yield (
            f"<tr><td>{_path(subset.place)}<td>{kind}<td class=number>{subset.images:,}"
            f"<td class=number>{repeats}<td class=number>{subset.samples:,}"
        )


def _buckets(inspection: Inspection) -> Iterator[str]:
    counts = inspection.summary.buckets
    most = max(counts.values(), default=1)
    longest = max((max(bucket) for bucket in counts), default=1)
    for bucket, count in counts.items():
        w, h = (max(2, round(26 * side / longest)) for side in bucket)
        shape = (
            f"<svg width=28 height=28 aria-hidden=true><rect x={14 - w / 2:g} y={14 - h / 2:g} width={w} height={h} "
            "rx=1.5 /></svg>"
        )
        yield (
            f"<tr data-bucket={bucket}><td class=shape>{shape}<td><button class=link>{bucket.w} × {bucket.h}</button>"
            f"<td class=number>{count:,}<td class=wide>{_bar(count / most)}"
        )


def _bar(share: float, *, mark: str = "") -> str:
    width = max(1.0, 100 * share) if share else 0
    return f'<div class="bar {mark}"><i style="width:{width:.1f}%"></i></div>'


def _path(path: str) -> str:
    """The name, and its folder in a line of its own."""
    folder, name = Path(path).parent, Path(path).name
    return f"<span class=path>{escape(name)}</span><span class=folder>{escape(str(folder))}</span>"


def _lengths(inspection: Inspection) -> Iterator[str]:
    lengths = [image.longest for image in inspection.images]
    limit = inspection.settings.max_token_length
    bins = caption_lengths(lengths)
    most = max((count for *_, count in bins), default=1)
    for first, last, count in bins:
        bar = _bar(count / most, mark="over" if first > limit else "")
        yield f"<tr><td class=number>{first}–{last}<td class=number>{count:,}<td class=wide>{bar}"


def _tags(inspection: Inspection) -> Iterator[str]:
    frequencies = tag_frequencies(inspection.images)
    most = max(frequencies.values(), default=1)
    for tag, count in list(frequencies.items())[:TAGS_SHOWN]:
        yield (
            f"<tr><td><button class=link data-search>{escape(tag)}</button><td class=number>{count:,}"
            f"<td class=wide>{_bar(count / most)}"
        )
    if len(frequencies) > TAGS_SHOWN:
        once = sum(count == 1 for count in frequencies.values())
        yield f"<tr><td class=quiet colspan=3>and {len(frequencies) - TAGS_SHOWN:,} more; {once:,} of all are used once"


def _captions(inspection: Inspection) -> Iterator[str]:
    repeated = repeated_captions(inspection.images)
    for caption, count in list(repeated.items())[:CAPTIONS_SHOWN]:
        text = escape(caption) if caption.strip() else "<i class=quiet>empty</i>"
        yield f"<tr><td class=number>{count:,}<td class=caption>{text}"
    if len(repeated) > CAPTIONS_SHOWN:
        yield f"<tr><td class=quiet colspan=2>and {len(repeated) - CAPTIONS_SHOWN:,} more"
    if not repeated:
        yield "<tr><td class=quiet colspan=2>none: every caption is used by one image"


def _problems(inspection: Inspection) -> Iterator[str]:
    if not inspection.problems:
        yield "<p class=quiet>None.</p>"
    for kind, count in inspection.counts.items():
        found = [problem for problem in inspection.problems if problem.kind == kind]
        yield f"<details class={kind}><summary><b>{count:,}</b> {escape(KINDS[kind])}</summary><ul>"
        yield from (
            f"<li><span class=path>{escape(problem.path)}</span> {escape(problem.what)}" for problem in found[:LISTED]
        )
        if count > LISTED:
            yield f"<li class=quiet>and {count - LISTED:,} more, which the file of --json lists"
        yield "</ul></details>"


def _alike(inspection: Inspection) -> Iterator[str]:
    groups = [("the same file", group) for group in inspection.identical]
    groups += [("look alike", group) for group in inspection.alike]
    for what, group in groups[:GROUPS_SHOWN]:
        yield f"<div class=group><h3>{len(group)} images: {what}</h3><div class=row>"
        for position in group:
            image = inspection.images[position]
            yield (
                f"<figure data-image={position}><figcaption>{_path(image.record.path)}"
                f"<span class=quiet>{image.record.size}</span><span class=caption>{escape(image.record.caption)}</span>"
                "</figcaption></figure>"
            )
        yield "</div></div>"
    if len(groups) > GROUPS_SHOWN:
        yield f"<p class=quiet>and {len(groups) - GROUPS_SHOWN:,} more groups, which the file of --json lists</p>"
    if not groups:
        yield "<p class=quiet>None.</p>"


def _embedded(inspection: Inspection) -> str:
    """The data of the page's script. No "<" is left, so nothing in it can end the element that holds it."""
    kinds: dict[str, list[str]] = defaultdict(list)
    for problem in inspection.problems:
        kinds[problem.path].append(problem.kind)
    images = [
        _image(image, look, kinds.get(image.record.path, []))
        for image, look in zip(inspection.images, inspection.looks, strict=True)
    ]
    data = {"images": images, "limit": inspection.settings.max_token_length, "heavyCrop": HEAVY_CROP, "kinds": KINDS}
    return to_json(data).replace("<", "\\u003c")


def _image(image: ImageFacts, look: Look, kinds: list[str]) -> dict[str, object]:
    record, crop = image.record, image.crop
    facts: dict[str, object] = {
        "path": record.path,
        "subset": record.subset.place,
        "bucket": str(image.bucket),
        "original": list(crop.original),
        "resized": list(crop.resized),
        "crop": [crop.left, crop.top, crop.target.w, crop.target.h],
        "ids": list(image.size_ids),
        "caption": image.caption,
        "tokens": image.tokens,
        "upscale": round(image.upscale, 3),
        "cropped": round(image.cropped_share, 4),
        "repeats": record.repeats,
    }
    if record.caption != image.caption:
        facts["source"] = record.caption
    if crop.flipped:
        facts["flipped"] = 1
    if kinds:
        facts["problems"] = sorted(set(kinds), key=list(KINDS).index)
    for name, picture in (("thumbnail", look.thumbnail), ("mask", look.mask)):
        if picture is not None:
            facts[name] = base64.b64encode(picture).decode()
    if look.error is not None:
        facts["error"] = look.error
    return facts
