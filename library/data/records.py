"""What a source says about an image, and what becomes of the images of a run. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from library.config.dataset_file import SubsetSpec
from library.data.buckets import Placement
from library.errors import UserError
from library.sizes import Size

READ_ERRORS = (UserError, OSError, ValueError, KeyError)
"""What a damaged image or cache file can raise; it costs the sample, not the run."""


class FileStamp(NamedTuple):
    """A file as the scan found it: bytes, and modification time in nanoseconds."""

    size: int
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """One image file and what its subset says about it.

    `key` names the image independently of where the data set lies ("<folder>/<file>", with "#2" and so on for a
    second use of the same name); every random draw of a sample is derived from it, so moving a data set does not
    change a training run. `size` is that of the file as it is shown (EXIF rotation applied), in pixels. `tags` is the
    tag part of `caption` for a source that keeps the two apart, else None. `mask` and `control` are the paths of the
    loss mask and of the condition image, where the subset has them. `stamp` is None when the source did not look.
    """

    key: str
    path: str
    size: Size
    caption: str
    subset: SubsetSpec
    repeats: int = 1
    weight: float = 1.0
    tags: str | None = None
    mask: str | None = None
    control: str | None = None
    stamp: FileStamp | None = None


@dataclass(frozen=True, slots=True)
class PlacedImage:
    """A record together with its bucket; `dataset` is the index of its `[[datasets]]` entry.

    `resolution` is the index of the one of the data set's resolutions that the bucket belongs to.
    """

    record: ImageRecord
    placement: Placement
    dataset: int
    resolution: int = 0


class Skipped(NamedTuple):
    """An image that is left out of training, and why."""

    path: str
    reason: str

    @classmethod
    def because_of(cls, path: str, error: Exception) -> Skipped:
        """The reason in one line."""
        if isinstance(error, UserError):
            return cls(path, "; ".join(problem.what for problem in error.problems))
        return cls(path, f"{type(error).__name__}: {error}")


@dataclass
class ScanReport:
    """What became of the images that were listed: left out, or without a caption."""

    skipped: list[Skipped] = field(default_factory=list)
    missing_captions: list[str] = field(default_factory=list)
