"""The masks and condition images of a subset: which file belongs to which image. Needs no torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from library.config.dataset_file import SubsetSpec
from library.data.dataset_index import DatasetIndex
from library.data.file_facts import image_sizes
from library.data.folder_listing import list_folder, prefix_of
from library.data.records import ImageRecord, ScanReport, Skipped
from library.sizes import Size


def add_companions(
    subset: SubsetSpec,
    records: Iterable[ImageRecord],
    *,
    report: ScanReport,
    cache_dir: Path | None = None,
    use_index: bool = True,
) -> Iterator[ImageRecord]:
    """The records of a subset with their `mask` and `control`, in the order they come in.

    A companion is the picture with the image's name or else with its stem, in the same sub-folder as the image has
    below `image_dir`. An image without one, or whose companion cannot be read or has another aspect ratio, is left
    out and listed in `report`. The sizes of companions come from their folder's index (in the folder, or below
    `cache_dir`) as far as it knows the files as they are now.
    """
    folders = _Folders(subset, cache_dir=cache_dir, use_index=use_index)
    if subset.mask_dir is not None:
        records = _paired(records, folders.of(subset.mask_dir), report, what="mask", attach=_with_mask)
    if subset.control_dir is not None:
        of = folders.of(subset.control_dir)
        records = _paired(records, of, report, what="condition image", attach=_with_control)
    yield from records


def has_aspect_of(companion: Size, image: Size) -> bool:
    """Whether one of the two is the other scaled as a whole, its sides rounded to whole pixels."""
    small, large = sorted((companion, image), key=lambda size: size.area)
    error_h = abs(large.h * small.w / large.w - small.h)
    error_w = abs(large.w * small.h / large.h - small.w)
    return min(error_h, error_w) < 1


def aspect_problem(companion: Size, image: Size) -> str:
    """Why a companion does not fit, as the end of a sentence."""
    return f"is {companion.w}x{companion.h}, another aspect ratio than the image's {image.w}x{image.h}"


def _with_mask(record: ImageRecord, path: str) -> ImageRecord:
    return replace(record, mask=path)


def _with_control(record: ImageRecord, path: str) -> ImageRecord:
    return replace(record, control=path)


def _paired(
    records: Iterable[ImageRecord],
    folder_of: Callable[[str], _Folder],
    report: ScanReport,
    *,
    what: str,
    attach: Callable[[ImageRecord, str], ImageRecord],
) -> Iterator[ImageRecord]:
    for record in records:
        place, name = os.path.split(record.path)
        folder = folder_of(place)
        found = folder.find(name)
        if len(found) == 1:
            size, problem = folder.look(found[0])
            if not problem and has_aspect_of(size, record.size):
                yield attach(record, folder.prefix + found[0])
                continue
            reason = f"its {what} {folder.prefix}{found[0]}: {problem}"
            if not problem:
                reason = f"its {what} {aspect_problem(size, record.size)}"
        elif found:
            reason = f"its {what} could be any of {', '.join(found)}"
        else:
            reason = f"it has no {what}: there is no {folder.prefix}{os.path.splitext(name)[0]}.*"
        report.skipped.append(Skipped(record.path, reason))


class _Folders:
    """The folders of companions, each listed when an image first asks for it."""

    def __init__(self, subset: SubsetSpec, *, cache_dir: Path | None, use_index: bool) -> None:
        self._root = os.path.normpath(subset.image_dir) if subset.image_dir else None
        self._cache_dir, self._use_index = cache_dir, use_index

    def of(self, top: str) -> Callable[[str], _Folder]:
        """Gives the folder below `top` for the companions of the images in a folder."""
        known: dict[str, _Folder] = {}

        def folder_of(place: str) -> _Folder:
            if place not in known:
                path = Path(top) / self._below(place)
                index = DatasetIndex(path, cache_dir=self._cache_dir, enabled=self._use_index)
                known[place] = _Folder(path, index)
            return known[place]

        return folder_of

    def _below(self, place: str) -> Path:
        """The part of a path below `image_dir`; empty when it lies elsewhere."""
        path = Path(os.path.normpath(place))
        is_below = self._root is not None and path.is_relative_to(self._root)
        return path.relative_to(self._root or "") if is_below else Path()


class _Folder:
    """The pictures of one folder by name and by stem, and their sizes; none when there is no such folder.

    `prefix` goes before a name to make a path.
    """

    def __init__(self, path: Path, index: DatasetIndex) -> None:
        self.prefix = prefix_of(path)
        self._row_of: dict[str, int] = {}
        self._by_stem: dict[str, list[str]] = {}
        if not path.is_dir():
            return
        listing = list_folder(path)
        images = listing.images
        for row, name in enumerate(images):
            self._row_of[name] = row
            self._by_stem.setdefault(os.path.splitext(name)[0], []).append(name)
        found = image_sizes(path, images, index=index, listed=listing.files)
        index.save()
        self._sizes, self._problems = found.table.sizes, found.problems

    def find(self, name: str) -> list[str]:
        """The picture of that name, else those with its stem."""
        return [name] if name in self._row_of else self._by_stem.get(os.path.splitext(name)[0], [])

    def look(self, name: str) -> tuple[Size, str]:
        """The size of a picture, and why it cannot be read (empty when it can)."""
        width, height = self._sizes[self._row_of[name]].tolist()
        return Size(width, height), self._problems.get(name, "")
