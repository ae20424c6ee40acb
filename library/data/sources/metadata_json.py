"""The images that a metadata file names: JSON or JSONL with captions, tags and sizes (cache_formats.md §3)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from library.config.dataset_file import SubsetSpec
from library.data.bulk import no_garbage_collection
from library.data.dataset_index import DatasetIndex
from library.data.file_facts import image_sizes
from library.data.folder_listing import Listing, file_stamps, images_among, list_folder, prefix_of
from library.data.metadata_file import Entry, locate, read_metadata
from library.data.records import FileStamp, ImageRecord, ScanReport, Skipped
from library.errors import UserError
from library.sizes import Size


class _Found(NamedTuple):
    """A metadata entry with the folder and the name of its file."""

    entry: Entry
    folder: _Folder
    name: str


def scan(
    subset: SubsetSpec, *, report: ScanReport, cache_dir: Path | None = None, use_index: bool = True
) -> Iterator[ImageRecord]:
    """The images of `subset.metadata_file` in the order of the file.

    A key is an absolute path or one relative to `subset.image_dir`, with or without the file extension. Folders are
    listed once each; an image is opened only when neither its entry has an `image_size` nor the folder's index (in
    the folder, or below `cache_dir`) its size. An entry without an image file, or one whose image was named before,
    is left out and listed in `report`; one with neither caption nor tags trains with an empty caption and is listed
    too, and so is a name that stands twice in one JSON object. Raises UserError, with the line, when the metadata
    file is missing, empty or wrong, and when a relative key has no image_dir.
    """
    assert subset.metadata_file is not None
    with no_garbage_collection():
        metadata = read_metadata(Path(subset.metadata_file))
        folders = _Folders(subset)
        report.skipped += [Skipped(folders.path_of(key), reason) for key, reason in metadata.repeated]
        found = list(_found(metadata.entries, folders, report))
        for folder in folders:
            folder.look(cache_dir=cache_dir, use_index=use_index)
    for entry, folder, name in found:
        path = folder.prefix + name
        if name in folder.problems:
            report.skipped.append(Skipped(path, folder.problems[name]))
            continue
        size = Size(*entry.image_size) if entry.image_size else folder.sizes[name]
        caption = join_caption(entry.caption, entry.tags, separator=subset.caption_separator)
        if not caption:
            report.missing_captions.append(path)
        key, stamp = folder.key_prefix + name, folder.stamps[name]
        repeats, weight = subset.num_repeats, subset.loss_weight
        yield ImageRecord(key, path, size, caption, subset, repeats, weight, tags=entry.tags, stamp=stamp)


def join_caption(caption: str, tags: str, *, separator: str) -> str:
    """Caption and tags as one text: each line of the caption, the separator, the tags; no space is added.

    Line breaks within the tags become separators. Either may be empty.
    """
    tags = separator.join(_lines(tags))
    lines = _lines(caption) or [""]
    return "\n".join(separator.join(part for part in (line, tags) if part) for line in lines)


def _lines(text: str) -> list[str]:
    return [stripped for line in text.splitlines() if (stripped := line.strip())]


def _found(entries: list[Entry], folders: _Folders, report: ScanReport) -> Iterator[_Found]:
    """The entries whose image is there, each image once."""
    for entry in entries:
        folder, stem = folders.place(entry.key)
        names = folder.find(stem)
        if len(names) != 1:
            reason = f"the metadata names {len(names)} images by one name: {', '.join(names)}; add the extension"
            reason = reason if names else "the metadata names an image that is missing"
            report.skipped.append(Skipped(folder.prefix + stem, reason))
        elif not folder.take(names[0], is_sized=entry.image_size is not None):
            report.skipped.append(Skipped(folder.prefix + names[0], "the metadata names it a second time"))
        else:
            yield _Found(entry, folder, names[0])


class _Folders:
    """The folders that a metadata file's keys lead to, by the part of the key before the file's name."""

    def __init__(self, subset: SubsetSpec) -> None:
        self._subset = subset
        self._root = Path(os.path.normpath(subset.image_dir)) if subset.image_dir else None
        self._by_path: dict[Path, _Folder] = {}
        self._by_head: dict[str, _Folder] = {}

    def __iter__(self) -> Iterator[_Folder]:
        return iter(self._by_path.values())

    def place(self, key: str) -> tuple[_Folder, str]:
        """The folder of a key, and the file's name or its stem. Raises UserError when nothing says where it lies."""
        head, name = os.path.split(key)
        folder = self._by_head.get(head)
        if folder is None:
            path = self._resolve(head, key)
            folder = self._by_path.get(path)
            if folder is None:
                folder = self._by_path[path] = _Folder(path, root=self._root or path)
            self._by_head[head] = folder
        return folder, name

    def path_of(self, key: str) -> str:
        """The image that a key names, or as much of its path as the key says."""
        folder, name = self.place(key)
        names = folder.find(name)
        return folder.prefix + (names[0] if len(names) == 1 else name)

    def _resolve(self, head: str, key: str) -> Path:
        if os.path.isabs(head):
            return Path(head)
        if self._root is None:
            raise UserError(
                f"the image name {key!r} is relative, and the subset has no image_dir",
                where=locate(Path(self._subset.metadata_file or ""), key),
                fix="set image_dir (with --in_json: --train_data_dir) to the folder that the names start from",
            )
        return Path(os.path.normpath(self._root / head))


class _Folder:
    """One folder of images: what is there, what the metadata takes of it, and what is known of that.

    `prefix` goes before a name to make a path, `key_prefix` to make a key that does not depend on where the data set
    lies. After `look`: `stamps` of the images taken, `sizes` of those that needed one, `problems` of those that cannot
    be read.
    """

    def __init__(self, path: Path, *, root: Path) -> None:
        self.path = path
        self.prefix = prefix_of(path)
        inner = path.relative_to(root).as_posix() if path.is_relative_to(root) else None
        self.key_prefix = {None: f"{path.name}/", ".": f"{root.name}/"}.get(inner, f"{root.name}/{inner}/")
        self.stamps: dict[str, FileStamp] = {}
        self.sizes: dict[str, Size] = {}
        self.problems: dict[str, str] = {}
        self._listing = list_folder(path) if path.is_dir() else Listing([], [])
        self._names = set(images := images_among(self._listing.files, hidden=True))
        self._stems: dict[str, list[str]] = {}
        for name in images:
            self._stems.setdefault(name[: name.rindex(".")], []).append(name)
        self._taken: dict[str, bool] = {}

    def find(self, name: str) -> list[str]:
        """The file of that name, else the files with that stem."""
        return [name] if name in self._names else self._stems.get(name, [])

    def take(self, name: str, *, is_sized: bool) -> bool:
        """Note that an image is used, and whether its size is known; False when it was used before."""
        if name in self._taken:
            return False
        self._taken[name] = is_sized
        return True

    def look(self, *, cache_dir: Path | None, use_index: bool) -> None:
        """Take the stamps of all images in use and the sizes that are not known."""
        sized = [name for name, is_sized in self._taken.items() if is_sized]
        unsized = sorted(name for name, is_sized in self._taken.items() if not is_sized)
        if sized:
            self._note_stamps(sized, file_stamps(self.path, sized))
        if unsized:
            index = DatasetIndex(self.path, cache_dir=cache_dir, enabled=use_index)
            found = image_sizes(self.path, unsized, index=index, listed=self._listing.files)
            index.save()
            self._note_stamps(unsized, found.table.stamps)
            self.sizes = dict(zip(unsized, map(Size, *found.table.sizes.T.tolist()), strict=True))
            self.problems = found.problems

    def _note_stamps(self, names: list[str], stamps: np.ndarray) -> None:
        self.stamps.update(zip(names, map(FileStamp, *stamps.T.tolist()), strict=True))
