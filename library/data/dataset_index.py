"""One small file per image folder with what was found in it: image sizes and captions, so that no file is opened again.

Reading the headers of a million images and as many caption files takes a minute on a fast disk and hours on a slow
one; listing them with sizes and times takes seconds. An entry counts only for a file whose bytes and modification time
are those of the entry. A file changed so short a time ago that a second change might leave both the same gets no
entry until the next run. An index that is missing, damaged or of another version is empty; losing it costs time and
nothing else. The format is described in docs/formats.md.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
import PIL

from library.data.cache_places import mirrored
from library.data.folder_listing import GONE
from library.errors import UserError
from library.io.atomic import atomic_path
from library.io.npz_file import BrokenArchive, read_arrays
from library.log import get_logger

log = get_logger(__name__)

FILE_NAME = ".sdxl_dataset_index"
VERSION = 1

SETTLED_NS = 2_000_000_000
"""A file changed less than this before it was read may change again within one tick of the file system's clock (2 s
on FAT), and look the same."""

_ENDS = "\0"
"""Stands between texts; no file name can hold it, and a text that does gets no entry."""


@dataclass(frozen=True)
class Table:
    """Facts about files of one folder, in columns.

    `stamps` int64 (N, 2): bytes, modification time in ns. Images: `sizes` int32 (N, 2) width and height, 0 when the
    image cannot be read; `texts` why not, else empty. Caption files: `sizes` (N, 0); `texts` their lines.
    """

    names: list[str]
    stamps: np.ndarray
    sizes: np.ndarray
    texts: list[str]

    @classmethod
    def empty(cls, columns: int) -> Table:
        """A table without rows; `columns` of sizes."""
        return cls([], np.empty((0, 2), np.int64), np.empty((0, columns), np.int32), [])

    def rows_of(self, names: Sequence[str], stamps: np.ndarray) -> np.ndarray:
        """The row of each file that is known and unchanged: int64 (N,), -1 for all others."""
        if names == self.names:
            rows = np.arange(len(names))
        else:
            row_of = {name: row for row, name in enumerate(self.names)}
            rows = np.fromiter((row_of.get(name, -1) for name in names), np.int64, len(names))
        if self.names:
            rows[(self.stamps[rows] != stamps).any(axis=1)] = -1
        return rows

    def taken(self, keep: np.ndarray) -> Table:
        """The rows where the bool array `keep` is set."""
        if keep.all():
            return self
        return Table(
            list(compress(self.names, keep)), self.stamps[keep], self.sizes[keep], list(compress(self.texts, keep))
        )

    def followed_by(self, other: Table) -> Table:
        """The rows of both."""
        return Table(
            self.names + other.names,
            np.concatenate([self.stamps, other.stamps]),
            np.concatenate([self.sizes, other.sizes]),
            self.texts + other.texts,
        )


class DatasetIndex:
    """The index of one folder: `images` and `captions` as they were known when it was opened.

    It lies in the folder itself, or below `cache_dir`. With `enabled` off it is empty and is not written.
    """

    def __init__(self, folder: Path, *, cache_dir: Path | None = None, enabled: bool = True) -> None:
        self.path = index_path(folder, cache_dir=cache_dir)
        self._enabled = enabled
        self._begin_ns = time.time_ns()
        self._tables = _read(self.path) if enabled else _nothing()
        self._changed = False

    @property
    def images(self) -> Table:
        """Image files."""
        return self._tables["images"]

    @property
    def captions(self) -> Table:
        """Caption files; all that are not empty of their lines, stripped, joined by line breaks."""
        return self._tables["captions"]

    def update(self, kind: str, found: Table, *, lasting: np.ndarray, listed: Sequence[str]) -> None:
        """Take up what was `found` about some of the folder's files.

        `lasting`, bool (N,), is off for facts that may change while the file does not. `listed` are the names of all
        files of the folder: entries of others are dropped.
        """
        known = self._tables[kind]
        if not self._enabled or _same(found, known):
            return
        found = found.taken(
            lasting & self._settled(found) & np.array([_ENDS not in text for text in found.texts], bool)
        )
        asked, present = set(found.names), set(listed)
        others = np.array([name not in asked and name in present for name in known.names], bool)
        merged = found.followed_by(known.taken(others)) if others.any() else found
        self._changed |= not _same(merged, known)
        self._tables[kind] = merged

    def save(self) -> None:
        """Write the index if there is anything new. A folder that cannot be written to goes without."""
        # One process per machine is enough; the others have found the same.
        if not self._changed or os.environ.get("LOCAL_RANK", "0") != "0":
            return
        try:
            with atomic_path(self.path, durable=False) as temporary, open(temporary, "wb") as file:
                np.savez(file, **_arrays(self._tables))
        except (UserError, OSError) as error:
            log.debug("no dataset index %s: %s", self.path, error)
        self._changed = False

    def _settled(self, found: Table) -> np.ndarray:
        """Whether a file is there and was not changed while it was being read, or just before; bool (N,)."""
        times = found.stamps[:, 1]
        recent = (times > self._begin_ns - SETTLED_NS) & (times < time.time_ns() + SETTLED_NS)
        return (found.stamps[:, 0] != GONE) & ~recent


def index_path(folder: Path, *, cache_dir: Path | None = None) -> Path:
    """Where the index of an image folder lies."""
    if cache_dir is None:
        return folder / FILE_NAME
    return mirrored(folder, cache_dir) / FILE_NAME


def _nothing() -> dict[str, Table]:
    return {"images": Table.empty(2), "captions": Table.empty(0)}


def _same(one: Table, other: Table) -> bool:
    return (
        one.names == other.names
        and np.array_equal(one.stamps, other.stamps)
        and np.array_equal(one.sizes, other.sizes)
        and one.texts == other.texts
    )


def _arrays(tables: dict[str, Table]) -> dict[str, Any]:
    # What can be opened depends on the library that opens it.
    arrays = {"version": np.array(VERSION), "pillow": np.array(PIL.__version__)}
    for kind, table in tables.items():
        arrays |= {f"{kind}_names": join_texts(table.names), f"{kind}_texts": join_texts(table.texts)}
        arrays |= {f"{kind}_stamps": table.stamps, f"{kind}_sizes": table.sizes}
    return arrays


def _read(path: Path) -> dict[str, Table]:
    """The tables of an index file; empty ones when it cannot be used."""
    if not path.is_file():
        return _nothing()
    try:
        arrays = read_arrays(path)
        if int(arrays["version"]) != VERSION:
            return _nothing()
        tables = {kind: _table(kind, arrays, columns=columns) for kind, columns in (("images", 2), ("captions", 0))}
        if str(arrays["pillow"]) != PIL.__version__:
            tables["images"] = tables["images"].taken(tables["images"].sizes[:, 0] > 0)
    except (BrokenArchive, KeyError, ValueError, TypeError) as error:
        log.debug("the dataset index %s is not used: %s", path, error)
        return _nothing()
    return tables


def _table(kind: str, arrays: dict[str, np.ndarray], *, columns: int) -> Table:
    names, texts = (split_texts(arrays[f"{kind}_{what}"]) for what in ("names", "texts"))
    stamps, sizes = arrays[f"{kind}_stamps"], arrays[f"{kind}_sizes"]
    texts = texts or [""] * len(names)  # one empty text looks like none
    expected = [(np.dtype(np.int64), (len(names), 2)), (np.dtype(np.int32), (len(names), columns))]
    if [(column.dtype, column.shape) for column in (stamps, sizes)] != expected or len(texts) != len(names):
        raise ValueError(f"the columns of {kind} do not fit together")
    return Table(names, stamps, sizes, texts)


def join_texts(texts: list[str]) -> np.ndarray:
    """Texts without a zero byte as one column of their UTF-8, uint8, with zero bytes between them."""
    return np.frombuffer(_ENDS.join(texts).encode("utf-8", "surrogatepass"), np.uint8)


def split_texts(column: np.ndarray) -> list[str]:
    """The texts of such a column; one empty text looks like none. Raises ValueError for what is no UTF-8."""
    return column.tobytes().decode("utf-8", "surrogatepass").split(_ENDS) if len(column) else []
