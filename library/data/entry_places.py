"""Where the npz files of a pass over many images lie, and which of them the indexes of their folders confirm.

Nothing here costs a Python object per entry for long: names are held in one buffer, folders once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from library.data.cache_index import CacheIndex, Known, join_stamps
from library.data.caching import agreed, groups_of, inspect_all, usable
from library.data.entry_files import choose_files
from library.data.folder_listing import GONE, file_stamps
from library.data.table import ImageTable, TextColumn
from library.io.latent_cache import CacheCheck

Seen = tuple[np.ndarray, np.ndarray]
"""Numbers of entries, and the stamps of their files when they were found right or written."""


class EntryPaths:
    """The path of every entry's file."""

    def __init__(self, folders: Sequence[str], folder_of: np.ndarray, names: TextColumn) -> None:
        self._folders, self._folder_of, self._names = folders, folder_of, names

    def __getitem__(self, number: int) -> str:
        return os.path.join(self._folders[self._folder_of[number]], self._names.text(number))

    def __len__(self) -> int:
        return len(self._folder_of)


class _Confirmed(NamedTuple):
    """For each entry the folder of its file by number, and its name; None where no index confirms one."""

    folder_of: np.ndarray
    names: TextColumn


class EntryPlaces:
    """The files of entries, found in the folders' indexes or else chosen.

    `folders` says for each folder of images where entries may lie, the place for new ones first; `folder_of` (int,
    (N,)) gives for each entry its folder of images; `made_from` are K columns of 64 bits as in the index: which image,
    and what else the entry depends on.
    """

    def __init__(
        self, kind: str, folders: Sequence[Sequence[str]], *, folder_of: np.ndarray, made_from: Sequence[np.ndarray]
    ) -> None:
        self._kind, self._places, self._image_folder_of = kind, folders, folder_of
        self._made_from = np.stack([column.astype(np.uint64) for column in made_from], axis=1)
        self._folders = list(dict.fromkeys(place for places in folders for place in places))
        self._number_of_folder = {folder: number for number, folder in enumerate(self._folders)}
        self._stamps = np.full((len(folder_of), 2), GONE, dtype=np.int64)
        self._rest = np.arange(len(folder_of))
        self._foreign: list[int] = []

    def confirm(self, *, rank: int) -> np.ndarray:
        """Ask the indexes; the numbers of the entries that none of them knows, equal on every rank."""
        found = agreed(self._ask() if rank == 0 else None)
        assert found is not None
        self._folder_of, self._names = found
        self._rest = np.flatnonzero(~self._names.is_there)
        return self._rest

    def find(
        self,
        standard: Sequence[Path],
        own: Callable[[int, Path], Path],
        inspect: Callable[[int, str], CacheCheck],
        *,
        beside: Sequence[Path] | None = None,
        rank: int,
        world: int,
        title: str,
    ) -> list[CacheCheck]:
        """Choose the files of the entries that no index confirmed, and say what is there of every entry.

        For each of those, in their order: `standard` is its file (for a new one, too), `own(number, path)` the file of
        its own name beside `path`, and `beside` a second place for an old one. The ranks share the looking.
        """
        rest = self._rest.tolist()
        checks = [CacheCheck("valid")] * len(self._names)
        if not rest:
            return checks
        looked: dict[tuple[int, str], tuple[int, int]] = {}

        def look(index: int, path: Path) -> CacheCheck:
            # Before the file is judged: what another run puts there meanwhile was not looked at.
            looked[rest[index], str(path)] = _stamp(path)
            return inspect(rest[index], str(path))

        paths, found = choose_files(
            standard,
            lambda index: own(rest[index], standard[index]),
            look,
            taken=self._taken(standard),
            rank=rank,
            world=world,
            title=title,
        )
        if beside is not None:
            _look_beside(paths, found, beside, look, rank=rank, world=world, title=title)
        self._take(rest, paths)
        for number, path, check in zip(rest, paths, found, strict=True):
            checks[number] = check
            if usable(check):  # else the rank that builds it will see it anew
                self._stamps[number] = looked.get((number, str(path)), (GONE, GONE))
        self._foreign = [number for number, check in zip(rest, found, strict=True) if check.status == "foreign"]
        return checks

    def look_again(self, number: int, inspect: Callable[[int, str], CacheCheck]) -> CacheCheck:
        """What is there of one entry now; may be called from several threads."""
        path = self.paths[number]
        stamp = _stamp(path)
        check = inspect(number, path)
        if usable(check):
            self._stamps[number] = stamp
        if check.status == "foreign":
            self._foreign.append(number)
        return check

    def _taken(self, wanted: Sequence[Path]) -> set[Path]:
        """Those of the wanted files that the indexes confirmed for other entries."""
        names, paths = set(map(str, wanted)), self.paths
        confirmed = np.flatnonzero(self._names.is_there).tolist()
        return {Path(path) for path in map(paths.__getitem__, confirmed) if path in names}

    def _take(self, numbers: Sequence[int], paths: Sequence[Path]) -> None:
        names: list[str | None] = self._names[:]
        for number, path in zip(numbers, paths, strict=True):
            folder, names[number] = os.path.split(path)
            if folder not in self._number_of_folder:
                self._number_of_folder[folder] = len(self._folders)
                self._folders.append(folder)
            self._folder_of[number] = self._number_of_folder[folder]
        self._names = TextColumn(names)

    @property
    def paths(self) -> EntryPaths:
        """Where every entry lies, once that is known of all."""
        return EntryPaths(self._folders, self._folder_of, self._names)

    def see(self, number: int) -> None:
        """Take down how large and old the file of an entry is when it has been written.

        Not at the end of the pass: by then another run may have replaced it.
        """
        self._stamps[number] = _stamp(self.paths[number])

    def seen(self) -> Seen:
        """What this rank has taken down."""
        numbers = np.flatnonzero(self._stamps[:, 0] != GONE)
        return numbers, self._stamps[numbers]

    def note(self, parts: Sequence[Seen], numbers: np.ndarray) -> None:
        """Write into the folders' indexes which files are right, as the ranks have seen them.

        Those confirmed are there already; those of other programs never are, since nothing proves what they hold.
        """
        numbers = np.setdiff1d(np.intersect1d(numbers, self._rest), self._foreign)
        stamps = join_stamps(parts, total=len(self._stamps))
        for folder, members in _by_folder(self._folder_of[numbers]):
            chosen = numbers[members]
            names = [self._names.text(number) for number in chosen.tolist()]
            index = CacheIndex(self._folders[folder], self._kind, width=self._made_from.shape[1])
            index.note(Known(names, stamps[chosen], self._made_from[chosen]))

    def _ask(self) -> _Confirmed:
        names: list[str | None] = [None] * len(self._made_from)
        folder_of = np.zeros(len(names), dtype=np.int32)
        for image_folder, members in _by_folder(self._image_folder_of):
            for folder in self._places[image_folder]:
                rest = members[[names[number] is None for number in members.tolist()]]
                if not len(rest):
                    break
                folder_of[rest] = self._number_of_folder[folder]
                index = CacheIndex(folder, self._kind, width=self._made_from.shape[1])
                for number, name in zip(rest.tolist(), index.find(self._made_from[rest]), strict=True):
                    names[number] = name
        return _Confirmed(folder_of, TextColumn(names))


def _stamp(path: str | Path) -> tuple[int, int]:
    try:
        facts = os.stat(path)
    except OSError:
        return GONE, GONE
    return facts.st_size, facts.st_mtime_ns


def _look_beside(
    paths: list[Path],
    checks: list[CacheCheck],
    beside: Sequence[Path],
    look: Callable[[int, Path], CacheCheck],
    *,
    rank: int,
    world: int,
    title: str,
) -> None:
    """Take entries that are not where they are looked for first from a second place, each file for one entry."""
    missing = [index for index, check in enumerate(checks) if not usable(check)]
    found = inspect_all(
        len(missing),
        lambda position: look(missing[position], beside[missing[position]]),
        rank=rank,
        world=world,
        title=f"{title} beside the images",
    )
    taken: set[Path] = set()
    for index, check in zip(missing, found, strict=True):
        if usable(check) and beside[index] not in taken:
            taken.add(beside[index])
            paths[index], checks[index] = beside[index], check


def _by_folder(folder_of: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Each folder's number with the positions where it stands, ascending."""
    order = np.argsort(folder_of, kind="stable")
    folders, starts = np.unique(folder_of[order], return_index=True)
    ends = np.append(starts, len(order))[1:]
    for folder, start, end in zip(folders.tolist(), starts, ends, strict=True):
        yield folder, order[start:end]


def ids_of(columns: Sequence[np.ndarray], describe: Callable[[int], int]) -> np.ndarray:
    """`describe` of every row, asked once for all rows that agree in the columns: uint64 (N,)."""
    first, group = groups_of(columns)
    values = np.fromiter((describe(row) for row in first.tolist()), np.uint64, len(first))
    return values[group]


def image_stamps(table: ImageTable, images: np.ndarray) -> np.ndarray:
    """Bytes and time of the image files, int64 (N, 2): as scanned, else as they are now; GONE for none."""
    stamps = table.stamps[images]
    unknown = np.flatnonzero(stamps[:, 0] < 0)
    paths = [table.paths.text(image) for image in images[unknown].tolist()]
    if paths:
        stamps[unknown] = file_stamps(os.curdir, paths)
    return stamps
