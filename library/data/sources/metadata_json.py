"""The images that a metadata file names: JSON or JSONL with captions, tags and sizes (cache_formats.md §3)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from library.config.dataset_file import SubsetSpec
from library.data.metadata_file import Entry, locate, read_metadata
from library.data.records import ImageRecord, ScanReport, Skipped
from library.data.sources.folders import read_sizes
from library.errors import UserError
from library.io.images import IMAGE_EXTENSIONS
from library.sizes import Size


class _Found(NamedTuple):
    """A metadata entry with its file, and with the name that does not depend on where the data set lies."""

    entry: Entry
    path: Path
    key: str


def scan(subset: SubsetSpec, *, report: ScanReport) -> Iterator[ImageRecord]:
    """The images of `subset.metadata_file` in the order of the file.

    A key is an absolute path or one relative to `subset.image_dir`, with or without the file extension. Folders are
    listed once each; an image is opened only when its entry has no `image_size`. An entry without an image file, or
    one whose image was named before, is left out and listed in `report`; one with neither caption nor tags trains
    with an empty caption and is listed too. Raises UserError, with the line, when the metadata file is missing, empty
    or wrong, and when a relative key has no image_dir.
    """
    assert subset.metadata_file is not None
    found = list(_found(subset, read_metadata(Path(subset.metadata_file)), report))
    unsized = [item.path for item in found if item.entry.image_size is None]
    sizes = dict(zip(unsized, read_sizes(unsized, title=Path(subset.metadata_file).name), strict=True))
    for entry, path, key in found:
        size = Size(*entry.image_size) if entry.image_size else sizes[path]
        if isinstance(size, Skipped):
            report.skipped.append(size)
            continue
        caption = join_caption(entry.caption, entry.tags, separator=subset.caption_separator)
        if not caption:
            report.missing_captions.append(str(path))
        yield ImageRecord(
            key, str(path), size, caption, subset, subset.num_repeats, subset.loss_weight, tags=entry.tags
        )


def join_caption(caption: str, tags: str, *, separator: str) -> str:
    """Caption and tags as one text: each line of the caption, the separator, the tags; no space is added.

    Line breaks within the tags become separators. Either may be empty.
    """
    tags = separator.join(_lines(tags))
    lines = _lines(caption) or [""]
    return "\n".join(separator.join(part for part in (line, tags) if part) for line in lines)


def _lines(text: str) -> list[str]:
    return [stripped for line in text.splitlines() if (stripped := line.strip())]


def _found(subset: SubsetSpec, entries: list[Entry], report: ScanReport) -> Iterator[_Found]:
    """The entries whose image is there, each image once."""
    folders: dict[Path, _Folder] = {}
    seen: set[Path] = set()
    for entry in entries:
        path = _path_of(entry, subset)
        if path.parent not in folders:
            folders[path.parent] = _Folder(path.parent)
        names = folders[path.parent].find(path.name)
        if len(names) != 1:
            reason = f"the metadata names {len(names)} images by one name: {', '.join(names)}; add the extension"
            report.skipped.append(
                Skipped(str(path), reason if names else "the metadata names an image that is missing")
            )
            continue
        path = path.with_name(names[0])
        if path in seen:
            report.skipped.append(Skipped(str(path), "the metadata names it a second time"))
            continue
        seen.add(path)
        yield _Found(entry, path, _key(path, subset))


def _path_of(entry: Entry, subset: SubsetSpec) -> Path:
    path = Path(entry.key)
    if path.is_absolute():
        return path
    if not subset.image_dir:
        raise UserError(
            f"the image name {entry.key!r} is relative, and the subset has no image_dir",
            where=locate(Path(subset.metadata_file or ""), entry.key),
            fix="set image_dir (with --in_json: --train_data_dir) to the folder that the names start from",
        )
    return Path(os.path.normpath(Path(subset.image_dir) / path))


def _key(path: Path, subset: SubsetSpec) -> str:
    root = Path(os.path.normpath(subset.image_dir)) if subset.image_dir else path.parent
    if path.is_relative_to(root):
        return f"{root.name}/{path.relative_to(root).as_posix()}"
    return f"{path.parent.name}/{path.name}"


class _Folder:
    """The image files of one folder by name and by stem, listed when it is first met; empty when there is none."""

    def __init__(self, path: Path) -> None:
        self._names: set[str] = set()
        self._stems: dict[str, list[str]] = {}
        if not path.is_dir():
            return
        with os.scandir(path) as entries:
            names = [entry.name for entry in entries if entry.is_file()]
        for name in sorted(names):
            if Path(name).suffix.lower() in IMAGE_EXTENSIONS:
                self._names.add(name)
                self._stems.setdefault(Path(name).stem, []).append(name)

    def find(self, name: str) -> list[str]:
        """The file of that name, else the files with that stem."""
        return [name] if name in self._names else self._stems.get(name, [])
