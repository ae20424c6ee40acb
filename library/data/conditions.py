"""Condition images made from pictures: edges, grey, blur, palettes. What a ControlNet-LLLite can learn to follow.

A picture is uint8 RGB (H, W, 3); so is its condition, of the same size. Lengths are shares of the shorter side, so that
a picture and its enlargement have the same condition.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image

from library.config.conditions import Settings
from library.data.folder_listing import images_among
from library.data.progress import progress_bar
from library.data.records import READ_ERRORS, Skipped
from library.errors import UserError
from library.io.atomic import atomic_path
from library.io.images import read_image


def canny(picture: np.ndarray, settings: Settings) -> np.ndarray:
    """White lines, one pixel wide, on black. Source: Canny 1986, as in OpenCV."""
    edges = cv2.Canny(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY), settings.low, settings.high)
    return _three(edges)


def soft_edges(picture: np.ndarray, settings: Settings) -> np.ndarray:
    """Edges in proportion to their contrast, the strongest white, on black; a picture of one colour is black.

    The length of Scharr's gradient of the blurred picture, in the channel where it is longest, over its maximum.
    """
    smooth = _blurred(picture, settings.soft).astype(np.float32)
    across, down = (cv2.Scharr(smooth, cv2.CV_32F, *axis) for axis in ((1, 0), (0, 1)))
    length = np.hypot(across, down).max(axis=2)
    top = float(length.max())
    return _three(np.round(length * (255 / top)).astype(np.uint8) if top > 0 else np.zeros(length.shape, np.uint8))


def grey(picture: np.ndarray, settings: Settings) -> np.ndarray:
    """Brightness without colour: 0.299 R + 0.587 G + 0.114 B (ITU-R BT.601)."""
    return _three(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY))


def blur(picture: np.ndarray, settings: Settings) -> np.ndarray:
    """The picture through a Gaussian filter: what is where, without its detail."""
    return _blurred(picture, settings.blur)


def palette(picture: np.ndarray, settings: Settings) -> np.ndarray:
    """Cells of one colour each, the mean of the pixels that they cover: which colours are where, without forms."""
    height, width = picture.shape[:2]
    scale = min(settings.cells / min(height, width), 1.0)
    cells = tuple(max(1, round(side * scale)) for side in (width, height))
    small = cv2.resize(picture, cells, interpolation=cv2.INTER_AREA)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_NEAREST_EXACT)


MAKERS: dict[str, Callable[[np.ndarray, Settings], np.ndarray]] = {
    "canny": canny,
    "soft": soft_edges,
    "grey": grey,
    "blur": blur,
    "palette": palette,
}


def _three(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[:, :, None], 3, axis=2)


def _blurred(picture: np.ndarray, share: float) -> np.ndarray:
    sigma = share * min(picture.shape[:2])
    return cv2.GaussianBlur(picture, (0, 0), sigma) if sigma > 0 else picture


@dataclass
class Made:
    """What became of the pictures of a folder."""

    written: int = 0
    kept: int = 0
    failed: list[Skipped] = field(default_factory=list)

    def lines(self) -> Iterator[str]:
        """The report: counts, then a line for each picture that was left out."""
        kept = f", {self.kept} were there already" if self.kept else ""
        failed = f", {len(self.failed)} pictures left out" if self.failed else ""
        yield f"{self.written} conditions written{kept}{failed}"
        yield from (f"  {path}: {reason}" for path, reason in self.failed)


class _Job(NamedTuple):
    source: Path
    target: Path


def make_conditions(
    source: Path, target: Path, *, kind: str, settings: Settings | None = None, overwrite: bool = False
) -> Made:
    """Write a PNG of the same stem (in the same sub-folder) into `target` for every picture of `source`.

    Conditions that are there are kept without `overwrite`, so that a run which was stopped goes on. Pictures that
    cannot be read, and the second of two with one stem, are left out and reported. Raises UserError when there is no
    picture, or the two folders are one.
    """
    if not source.is_dir():
        raise UserError("there is no such folder", str(source), "name the folder of the pictures")
    if source.resolve() == target.resolve():
        raise UserError("conditions would take the pictures' place", str(target), "name another folder for them")
    made, jobs = Made(), []
    taken: dict[Path, Path] = {}
    for path in _pictures(source, leave_out=target):
        job = _Job(path, (target / path.relative_to(source)).with_suffix(".png"))
        first = taken.setdefault(job.target, path)
        if first is not path:
            made.failed.append(Skipped(str(path), f"{first.name} has the same stem, and so the same condition"))
        else:
            jobs.append(job)
    if not jobs:
        raise UserError("the folder holds no picture", str(source), "name the folder of the pictures")
    with progress_bar(len(jobs), title=f"{kind} conditions") as bar:
        for job in jobs:
            if job.target.exists() and not overwrite:
                made.kept += 1
            else:
                _make(job, MAKERS[kind], settings or Settings(), made)
            bar.update()
    return made


def _make(job: _Job, convert: Callable[[np.ndarray, Settings], np.ndarray], settings: Settings, made: Made) -> None:
    try:
        condition = convert(read_image(job.source), settings)
    except READ_ERRORS as error:
        made.failed.append(Skipped.because_of(str(job.source), error))
        return
    with atomic_path(job.target, durable=False) as temporary:
        Image.fromarray(condition).save(temporary, format="PNG")
    made.written += 1


def _pictures(folder: Path, *, leave_out: Path) -> Iterator[Path]:
    """The images in a folder and below, by name; hidden ones and those below `leave_out` do not count."""
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(
            name for name in folders if name[0] != "." and (Path(place) / name).resolve() != leave_out.resolve()
        )
        yield from (Path(place) / name for name in images_among(names))
