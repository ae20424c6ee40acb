"""The images of a run, held in columns.

A million Python objects cost a gigabyte and, in every loader process, a copy of it; the same facts in a few arrays
cost some hundred bytes an image and are shared. A row is made into an object only when somebody asks for it.
"""

from __future__ import annotations

import copy
import hashlib
import os
from array import array
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import accumulate, islice
from typing import Generic, TypeVar, overload

import numpy as np

from library.config.dataset_file import SubsetSpec
from library.data.buckets import Placement
from library.data.records import FileStamp, ImageRecord, PlacedImage
from library.sizes import Size

_NONE = b"\xff"  # no UTF-8 text holds this byte
_NO_STAMP = -1
_AT_ONCE = 4096

Item = TypeVar("Item")


class TextColumn(Sequence[str | None]):
    """Texts, or None, in one buffer of UTF-8."""

    def __init__(self, texts: Iterable[str | None] = ()) -> None:
        self._data = bytearray()
        self._ends = array("Q", [0])
        self.extend(texts)

    def append(self, text: str | None) -> None:
        """Add one at the end."""
        self.extend((text,))

    def extend(self, texts: Iterable[str | None]) -> None:
        """Add several at the end."""
        cells = [_NONE if text is None else text.encode("utf-8", "surrogatepass") for text in texts]
        self._ends.extend(accumulate(map(len, cells), initial=self._ends.pop()))
        self._data += b"".join(cells)

    @overload
    def __getitem__(self, index: int) -> str | None: ...
    @overload
    def __getitem__(self, index: slice) -> list[str | None]: ...
    def __getitem__(self, index: int | slice) -> str | list[str | None] | None:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        cell = bytes(self._data[self._ends[index] : self._ends[index + 1]])
        return None if cell == _NONE else cell.decode("utf-8", "surrogatepass")

    def text(self, index: int) -> str:
        """The text of a cell that is known to hold one."""
        text = self[index]
        assert text is not None, index
        return text

    def cells(self, numbers: np.ndarray) -> Iterator[bytes]:
        """The UTF-8 of many cells that are known to hold texts; a third of the time of asking for each."""
        ends = np.frombuffer(self._ends, dtype=np.uint64)
        bounds = zip(ends[numbers].tolist(), ends[numbers + 1].tolist(), strict=True)
        del ends  # as long as it is there no text can be added
        data = bytes(self._data)
        return (data[start:end] for start, end in bounds)

    def has_text(self, numbers: np.ndarray) -> np.ndarray:
        """For every cell, bool, whether it holds a text."""
        ends = np.frombuffer(self._ends, dtype=np.uint64)
        data = np.frombuffer(bytes(self._data) + _NONE, dtype=np.uint8)
        starts = ends[numbers]
        return (ends[numbers + 1] - starts != 1) | (data[starts] != _NONE[0])

    def __len__(self) -> int:
        return len(self._ends) - 1

    @property
    def is_there(self) -> np.ndarray:
        """Which cells hold a text, bool (N,)."""
        ends = np.frombuffer(self._ends, dtype=np.uint64).astype(np.int64)
        starts, lengths = ends[:-1], np.diff(ends)
        first = np.frombuffer(self._data + b"\0", dtype=np.uint8)[starts]
        return (lengths != len(_NONE)) | (first != _NONE[0])

    @property
    def num_bytes(self) -> int:
        """Memory that the texts take."""
        return len(self._data) + self._ends.itemsize * len(self._ends)


def text_id(text: str) -> int:
    """64 bits that stand for a text, equal on every platform."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


class ImageTable(Sequence[PlacedImage]):
    """Placed images by row, and what is known of each image by its number.

    An image that is offered at several resolutions has one row for each, one after the other; every other image has
    one row. Rows and numbers stay what they are for the whole run: `drop` marks images as gone, and an image without
    repeats is not used either. `rows` and `images` list what is used; in a `part`, what is used of it.

    Columns by row: `image_of`, `dataset_of` (int64), `placement_of` (int64, into `placements`) and `resolution_of`
    (int64, into the resolutions of the data set). By image: `keys`,
    `paths`, `captions`, `tags`, `masks`, `controls`; `sizes` (int64, (N, 2): w, h); `subset_of` (int64, into
    `subsets`); `repeats` (int64, may be set); `weights` (float64); `stamps` (int64, (N, 2): bytes and mtime_ns, -1
    where the source did not look); `folder_of` (int64, into `folders`) and `name_ids` (uint64, `text_id` of the name)
    of the file; `is_validation` (bool).
    """

    def __init__(self, images: Iterable[PlacedImage] = ()) -> None:
        self.placements: list[Placement] = []
        self.subsets: list[SubsetSpec] = []
        self.keys, self.paths, self.captions = TextColumn(), TextColumn(), TextColumn()
        self.tags, self.masks, self.controls = TextColumn(), TextColumn(), TextColumn()
        self._fill(images)

    def _fill(self, images: Iterable[PlacedImage]) -> None:
        image_of, dataset_of, placement_of, resolution_of, subset_of, repeats = (array("q") for _ in range(6))
        sizes, stamps, weights, folder_of, name_ids = array("q"), array("q"), array("d"), array("q"), array("Q")
        placement_number = _Numbers(self.placements)
        subset_number = _Numbers(self.subsets, by_value=False)
        folder_numbers: dict[str, int] = {}
        last: ImageRecord | None = None
        images = iter(images)
        # Column by column: for a million images that takes half the time of record by record.
        while chunk := list(islice(images, _AT_ONCE)):
            records = []
            for placed in chunk:
                if placed.record is not last:
                    last = placed.record
                    records.append(last)
                image_of.append(len(subset_of) + len(records) - 1)
            self._add_texts(records)
            sizes.extend(side for record in records for side in record.size)
            stamps.extend(fact for record in records for fact in record.stamp or (_NO_STAMP, _NO_STAMP))
            weights.extend([record.weight for record in records])
            repeats.extend([record.repeats for record in records])
            subset_of.extend([subset_number(record.subset) for record in records])
            files = [_split(record.path) for record in records]
            folder_of.extend([folder_numbers.setdefault(folder, len(folder_numbers)) for folder, _ in files])
            name_ids.extend([text_id(name) for _, name in files])
            placement_of.extend([placement_number(placed.placement) for placed in chunk])
            dataset_of.extend([placed.dataset for placed in chunk])
            resolution_of.extend([placed.resolution for placed in chunk])
        self.image_of, self.dataset_of, self.placement_of = map(_int64, (image_of, dataset_of, placement_of))
        self.resolution_of = _int64(resolution_of)
        self.subset_of, self.repeats, self.folder_of = map(_int64, (subset_of, repeats, folder_of))
        self.sizes, self.stamps = _int64(sizes).reshape(-1, 2), _int64(stamps).reshape(-1, 2)
        self.weights = np.array(weights, dtype=np.float64)
        self.name_ids = np.array(name_ids, dtype=np.uint64)
        self.folders = list(folder_numbers)
        self.is_live = np.ones(len(self.keys), dtype=bool)
        self.is_validation = np.zeros(len(self.keys), dtype=bool)
        self._side: bool | None = None

    def _add_texts(self, records: Sequence[ImageRecord]) -> None:
        self.keys.extend([record.key for record in records])
        self.paths.extend([record.path for record in records])
        self.captions.extend([record.caption for record in records])
        self.tags.extend([record.tags for record in records])
        self.masks.extend([record.mask for record in records])
        self.controls.extend([record.control for record in records])

    def __len__(self) -> int:
        return len(self.image_of)

    @overload
    def __getitem__(self, row: int) -> PlacedImage: ...
    @overload
    def __getitem__(self, row: slice) -> list[PlacedImage]: ...
    def __getitem__(self, row: int | slice) -> PlacedImage | list[PlacedImage]:
        if isinstance(row, slice):
            return [self[i] for i in range(*row.indices(len(self)))]
        record = self.record(int(self.image_of[row]))
        return PlacedImage(record, self.placement(row), int(self.dataset_of[row]), int(self.resolution_of[row]))

    def placement(self, row: int) -> Placement:
        """Where the image of a row goes."""
        return self.placements[self.placement_of[row]]

    def rows_of(self, image: int) -> range:
        """The rows of an image: one for each resolution that it is offered at."""
        return range(*np.searchsorted(self.image_of, [image, image + 1]).tolist())

    def record(self, image: int) -> ImageRecord:
        """What the source said about an image, with the repeats it has now."""
        width, height = self.sizes[image].tolist()
        size, mtime_ns = self.stamps[image].tolist()
        return ImageRecord(
            key=self.keys.text(image),
            path=self.paths.text(image),
            size=Size(width, height),
            caption=self.captions.text(image),
            subset=self.subset(image),
            repeats=int(self.repeats[image]),
            weight=float(self.weights[image]),
            tags=self.tags[image],
            mask=self.masks[image],
            control=self.controls[image],
            stamp=None if size == _NO_STAMP else FileStamp(size, mtime_ns),
        )

    def subset(self, image: int) -> SubsetSpec:
        """The subset that an image belongs to."""
        return self.subsets[self.subset_of[image]]

    @property
    def path_ids(self) -> np.ndarray:
        """For every image 64 bits that stand for its path, uint64 (N,)."""
        folders = np.fromiter(map(text_id, self.folders), np.uint64, len(self.folders))
        # Rotated, lest folder and name of one text cancel out.
        return self.name_ids ^ (folders << np.uint64(1) | folders >> np.uint64(63))[self.folder_of]

    @property
    def num_images(self) -> int:
        """How many images there are, those that are not used included."""
        return len(self.keys)

    def set_validation(self, is_validation: np.ndarray, change: Callable[[SubsetSpec], SubsetSpec]) -> None:
        """Hold images (bool (N,)) out of training; their subsets become what `change` makes of them."""
        self.is_validation = is_validation & self.is_live
        held = np.flatnonzero(self.is_validation)
        self.repeats[held] = np.minimum(self.repeats[held], 1)
        for number in np.unique(self.subset_of[held]).tolist():
            self.subset_of[held[self.subset_of[held] == number]] = len(self.subsets)
            self.subsets.append(change(self.subsets[number]))

    def part(self, *, validation: bool) -> ImageTable:
        """The images that are held out, or those that are not, with the same rows and numbers.

        The columns are shared: what is dropped from a part is dropped from the whole.
        """
        part = copy.copy(self)
        part._side = validation
        return part

    @property
    def num_held_out(self) -> int:
        """How many images are kept for validation, whatever part this is."""
        return int((self.is_validation & self.is_live & (self.repeats > 0)).sum())

    @property
    def is_used(self) -> np.ndarray:
        """For every image whether it is used, bool (N,)."""
        used = self.is_live & (self.repeats > 0)
        return used if self._side is None else used & (self.is_validation == self._side)

    @property
    def images(self) -> np.ndarray:
        """The numbers of the images that are used, int64, ascending."""
        return np.flatnonzero(self.is_used)

    @property
    def rows(self) -> np.ndarray:
        """The rows of the images that are used, int64, ascending."""
        return np.flatnonzero(self.is_used[self.image_of])

    @property
    def is_reg(self) -> np.ndarray:
        """For every image whether it is a regularisation image, bool (N,)."""
        return np.array([subset.is_reg for subset in self.subsets], dtype=bool)[self.subset_of]

    @property
    def image_datasets(self) -> np.ndarray:
        """For every image the index of its `[[datasets]]` entry, int64 (N,)."""
        datasets = np.zeros(self.num_images, dtype=np.int64)
        datasets[self.image_of] = self.dataset_of
        return datasets

    def used(self) -> Iterator[PlacedImage]:
        """The rows in use as objects, one after the other."""
        return (self[row] for row in self.rows.tolist())

    def images_at(self, path: str) -> np.ndarray:
        """The numbers of the images with this path, int64."""
        named = np.flatnonzero(self.name_ids == text_id(_split(path)[1]))
        return named[[self.paths[image] == path for image in named.tolist()]]

    def drop(self, paths: Collection[str]) -> None:
        """Leave images out for the rest of the run."""
        gone = set(paths)
        for image in np.flatnonzero(self.is_live).tolist():
            if self.paths[image] in gone:
                self.is_live[image] = False


class _Numbers(Generic[Item]):
    """The place of an item in a list of distinct ones, where it is added when it is new.

    An object that has been asked for is known again without hashing its value, which takes long for a placement.
    """

    def __init__(self, items: list[Item], *, by_value: bool = True) -> None:
        self._items, self._by_value = items, by_value
        self._by_id: dict[int, int] = {}
        self._numbers: dict[Item, int] = {}
        self._asked: list[Item] = []  # or their ids would come again

    def __call__(self, item: Item) -> int:
        number = self._by_id.get(id(item))
        return self._add(item) if number is None else number

    def _add(self, item: Item) -> int:
        number = self._numbers.setdefault(item, len(self._items)) if self._by_value else len(self._items)
        if number == len(self._items):
            self._items.append(item)
        self._asked.append(item)
        self._by_id[id(item)] = number
        return number


def _split(path: str) -> tuple[str, str]:
    """As os.path.split, which takes five times as long for a path of the common form."""
    folder, separator, name = path.rpartition(os.sep)
    return (folder, name) if folder and name and folder[-1] != separator else os.path.split(path)


def _int64(values: array) -> np.ndarray:
    return np.array(values, dtype=np.int64)
