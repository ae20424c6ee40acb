"""One small file per folder and kind of cache that says which cache files are known to be right, so they stay closed.

Opening and reading a million npz files takes ten minutes; a `stat` of each takes seconds. The index only ever
confirms: an entry that should have been made from something else, or whose file has another size or time than when it
was found right, is looked for and judged as without an index. Losing the index costs time and nothing else. The
format is described in docs/formats.md.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np

from library.data.dataset_index import join_texts, split_texts
from library.data.folder_listing import GONE, file_stamps
from library.errors import UserError
from library.io.atomic import atomic_path
from library.io.npz_file import BrokenArchive, read_arrays
from library.log import get_logger

log = get_logger(__name__)

VERSION = 2
"""Version 1 was a JSON file of another name."""

_MIX = np.uint64(0x9E3779B97F4A7C15)  # odd, so multiplying by it loses nothing


def index_name(kind: str) -> str:
    """The name of the index of the "latents" or of the encoded "text" in a folder."""
    return f".sdxl_{kind}_index"


@dataclass(frozen=True)
class Known:
    """Cache files as they were when they were found right.

    `stamps` int64 (N, 2): bytes, modification time in ns. `made_from` uint64 (N, K): numbers that together say which
    entry the file holds and what it was made from.
    """

    names: list[str]
    stamps: np.ndarray
    made_from: np.ndarray

    def taken(self, keep: np.ndarray) -> Known:
        """The rows where the bool array `keep` is set."""
        return Known(list(compress(self.names, keep)), self.stamps[keep], self.made_from[keep])

    def followed_by(self, other: Known) -> Known:
        """The rows of both."""
        return Known(
            self.names + other.names,
            np.concatenate([self.stamps, other.stamps]),
            np.concatenate([self.made_from, other.made_from]),
        )


class CacheIndex:
    """The index of the cache files of one kind in one folder; `width` numbers say what an entry was made from."""

    def __init__(self, folder: str | Path, kind: str, *, width: int) -> None:
        self._folder, self._path, self._width = folder or os.curdir, Path(folder, index_name(kind)), width

    def find(self, made_from: np.ndarray) -> list[str | None]:
        """For each entry, uint64 (N, width), the name of the file that was found right for it and is as it was."""
        known = self._read()
        found: list[str | None] = [None] * len(made_from)
        rows = rows_of(made_from, known.made_from)
        asked = np.flatnonzero(rows >= 0)
        names = [known.names[row] for row in rows[asked].tolist()]
        try:
            stamps = file_stamps(self._folder, names)
        except OSError as error:
            log.debug("the cache index %s is not used: %s", self._path, error)
            return found
        same = (stamps == known.stamps[rows[asked]]).all(axis=1)
        for number, name, is_same in zip(asked.tolist(), names, same.tolist(), strict=True):
            if is_same:
                found[number] = name
        return found

    def note(self, files: Known) -> None:
        """Take up files that are right, and write the index. A folder that cannot be written to goes without.

        What was known of the same files, or of the same entries in other files, is dropped; so is what is said of
        files that were gone.
        """
        files = files.taken(files.stamps[:, 0] != GONE)
        known, new = self._read(), set(files.names)
        keep = np.array([name not in new for name in known.names], dtype=bool)
        keep &= rows_of(known.made_from, files.made_from) < 0
        merged = known.taken(keep).followed_by(files)
        arrays: dict[str, Any] = {
            "version": np.array(VERSION),
            "names": join_texts(merged.names),
            "stamps": merged.stamps,
            "made_from": merged.made_from,
        }
        try:
            with atomic_path(self._path, durable=False) as temporary, open(temporary, "wb") as file:
                np.savez(file, **arrays)
        except (UserError, OSError) as error:
            log.debug("no cache index %s: %s", self._path, error)

    def _read(self) -> Known:
        """What the index file says; nothing when it cannot be used."""
        nothing = Known([], np.empty((0, 2), np.int64), np.empty((0, self._width), np.uint64))
        if not self._path.is_file():
            return nothing
        try:
            arrays = read_arrays(self._path)
            if int(arrays["version"]) != VERSION:
                return nothing
            known = Known(split_texts(arrays["names"]), arrays["stamps"], arrays["made_from"])
            count = len(known.names)
            expected = [(np.dtype(np.int64), (count, 2)), (np.dtype(np.uint64), (count, self._width))]
            if [(column.dtype, column.shape) for column in (known.stamps, known.made_from)] != expected:
                raise ValueError("the columns do not fit together")
        except (BrokenArchive, KeyError, ValueError, TypeError) as error:
            log.debug("the cache index %s is not used: %s", self._path, error)
            return nothing
        return known


def rows_of(asked: np.ndarray, known: np.ndarray) -> np.ndarray:
    """The number of the row of `known` that equals each row of `asked` (both uint64, (*, K)): int64, -1 for none."""
    if np.array_equal(asked, known):
        return np.arange(len(asked))
    if not len(known):
        return np.full(len(asked), -1, dtype=np.int64)
    codes = _codes(known)
    order = np.argsort(codes, kind="stable")
    places = np.searchsorted(codes[order], _codes(asked))
    rows = order[np.minimum(places, len(order) - 1)]
    # The codes only lead to the row; whether it is equal is asked of the row itself.
    return np.where((known[rows] == asked).all(axis=1), rows, -1)


def _codes(rows: np.ndarray) -> np.ndarray:
    codes = np.zeros(len(rows), dtype=np.uint64)
    for column in rows.T:
        codes = (codes ^ (codes >> np.uint64(32))) * _MIX + column
    return codes


def join_stamps(parts: Sequence[tuple[np.ndarray, np.ndarray]], *, total: int) -> np.ndarray:
    """Stamps by number, int64 (total, 2), from (numbers, stamps) of several ranks; GONE where nobody looked."""
    stamps = np.full((total, 2), GONE, dtype=np.int64)
    for numbers, found in parts:
        stamps[numbers] = found
    return stamps
