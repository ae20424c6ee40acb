"""One look at each picture of a data set: is it whole, what does it look like, and what does its mask cover."""

from __future__ import annotations

import hashlib
import io
import os
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
from PIL import Image

from library.data.companions import aspect_problem, has_aspect_of
from library.data.near_duplicates import colour_layout, perceptual_hash
from library.data.progress import progress_bar
from library.data.records import READ_ERRORS, ImageRecord, Skipped
from library.errors import UserError
from library.io.images import Reduced, read_reduced

THUMBNAIL_EDGE = 160
"""Pixels of a thumbnail's longer side; the perceptual hash needs 32."""

THUMBNAIL_QUALITY = 72
PICTURES_AT_ONCE = 1024
"""Pictures that are handed to the reading threads together, so that a large data set is not queued as a whole."""


@dataclass(frozen=True, slots=True)
class Look:
    """What one picture showed.

    `error` says why it cannot be read, else the hash and the colours (uint8 (192,)) are there. `thumbnail` (JPEG) and
    `mask` (PNG, grey: white is trained on) are there when they were asked for; `mask_error` says why a mask cannot be
    read.
    """

    error: str | None = None
    hash: int = 0
    colours: np.ndarray | None = None
    thumbnail: bytes | None = None
    mask: bytes | None = None
    mask_error: str | None = None


def look_at(records: Sequence[ImageRecord], *, with_thumbnail: Collection[int] = ()) -> list[Look]:
    """Look at every picture, in threads; `with_thumbnail` are the positions of those that get one."""
    look = partial(_look, records, frozenset(with_thumbnail))
    looks: list[Look] = []
    with (
        ThreadPoolExecutor(os.cpu_count() or 1) as pool,
        progress_bar(len(records), title="looking at pictures", delay=2.0) as bar,
    ):
        for start in range(0, len(records), PICTURES_AT_ONCE):
            for found in pool.map(look, range(start, min(start + PICTURES_AT_ONCE, len(records)))):
                looks.append(found)
                bar.update()
    return looks


def _look(records: Sequence[ImageRecord], with_thumbnail: frozenset[int], position: int) -> Look:
    record = records[position]
    try:
        reduced = read_reduced(record.path, edge=THUMBNAIL_EDGE)
        if reduced.size != record.size:
            return Look(error=f"the image is {reduced.size}; the data set was listed with {record.size}")
    except READ_ERRORS as error:
        return Look(error=Skipped.because_of(record.path, error).reason)
    thumbnail = mask = grey = mask_error = None
    try:
        grey = _mask_of(record, reduced)
    except READ_ERRORS as error:
        mask_error = Skipped.because_of(str(record.mask), error).reason
    if position in with_thumbnail:
        thumbnail = _encoded(reduced.rgb, "JPEG", quality=THUMBNAIL_QUALITY)
        mask = None if grey is None else _encoded(grey, "PNG")
    return Look(None, perceptual_hash(reduced.rgb), colour_layout(reduced.rgb), thumbnail, mask, mask_error)


def _mask_of(record: ImageRecord, reduced: Reduced) -> np.ndarray | None:
    """What the loss is weighted with, uint8 (h, w): the red of the mask file, or the picture's own transparency."""
    if record.mask is not None:
        mask = read_reduced(record.mask, edge=THUMBNAIL_EDGE)
        if not has_aspect_of(mask.size, record.size):
            raise UserError(f"the mask {aspect_problem(mask.size, record.size)}", where=record.mask)
        return mask.rgb[:, :, 0]
    return reduced.alpha if record.subset.alpha_mask else None


def _encoded(image: np.ndarray, kind: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(buffer, kind, **options)
    return buffer.getvalue()


def identical_files(paths: Sequence[str]) -> list[list[int]]:
    """Positions of files of equal content, in groups of two or more; only files of equal length are read.

    A path that stands in `paths` several times counts once. Files that cannot be read are equal to none.
    """
    first_of = {path: position for position, path in reversed(list(enumerate(paths)))}
    by_length: dict[int, list[int]] = defaultdict(list)
    for path, position in sorted(first_of.items(), key=lambda item: item[1]):
        try:
            by_length[os.path.getsize(path)].append(position)
        except OSError:
            continue
    groups = [group for members in by_length.values() if len(members) > 1 for group in _equal(paths, members)]
    return sorted(groups)


def _equal(paths: Sequence[str], members: Sequence[int]) -> Iterator[list[int]]:
    by_content: dict[bytes, list[int]] = defaultdict(list)
    for position in members:
        try:
            with open(paths[position], "rb") as file:
                by_content[hashlib.file_digest(file, "blake2b").digest()].append(position)
        except OSError:
            continue
    yield from (group for group in by_content.values() if len(group) > 1)
