"""What lies in a folder, from one pass over it, and the sizes and times of its files; no file is opened."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from library.data.many_files import in_chunks
from library.errors import UserError
from library.io.images import IMAGE_EXTENSIONS

GONE = -1
"""Bytes and time of a file that is not there."""

_IMAGE_ENDINGS = tuple(IMAGE_EXTENSIONS)


@dataclass(frozen=True)
class Listing:
    """The names of a folder's files, links followed, in no order; and of links that lead nowhere."""

    files: list[str]
    broken_links: list[str]

    @property
    def images(self) -> list[str]:
        """The image files by extension, in any case, sorted."""
        return images_among(self.files)

    @property
    def broken_images(self) -> list[str]:
        """The links that lead nowhere and are named like images, sorted."""
        return images_among(self.broken_links)


def list_folder(folder: str | os.PathLike[str]) -> Listing:
    """List a folder without its sub-folders. Raises UserError when the system refuses."""
    files: list[str] = []
    others: list[os.DirEntry[str]] = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_file():
                    files.append(entry.name)
                else:
                    others.append(entry)
    except OSError as error:
        raise UserError(
            f"the image folder cannot be listed ({error.strerror})", where=str(folder), fix="check its permissions"
        ) from error
    broken = [entry.name for entry in others if entry.is_symlink() and not os.path.exists(entry.path)]
    return Listing(files, broken)


def images_among(names: Collection[str], *, hidden: bool = False) -> list[str]:
    """Names with an image extension in any case, sorted; without hidden files unless they are asked for."""
    images = [name for name in names if name.lower().endswith(_IMAGE_ENDINGS)]
    return sorted(name for name in images if (name[0] != "." or (hidden and name.rindex(".") > 0)))


def prefix_of(folder: Path) -> str:
    """What to put before a file's name to get `str(folder / name)`; joining paths costs more than listing them."""
    return str(folder / "_")[:-1]


def file_stamps(folder: str | os.PathLike[str], names: Sequence[str]) -> np.ndarray:
    """Bytes and modification time in ns of the folder's files: int64 (N, 2); GONE for what is not there."""
    with _StatIn(folder) as stat:
        return np.concatenate([np.empty((0, 2), np.int64), *in_chunks(partial(_stamps, stat=stat), names)])


class _StatIn:
    """Gives `os.stat` for names in one folder; by the open folder where the system can, which saves the path's walk."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._folder = folder
        self._descriptor: int | None = None

    def __enter__(self) -> Callable[[str], os.stat_result]:
        if os.stat not in os.supports_dir_fd:
            return lambda name: os.stat(os.path.join(self._folder, name))
        self._descriptor = os.open(self._folder, os.O_RDONLY)
        return partial(os.stat, dir_fd=self._descriptor)

    def __exit__(self, *_: object) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)


def _stamps(names: Sequence[str], stat: Callable[[str], os.stat_result]) -> np.ndarray:
    stamps = np.empty((len(names), 2), dtype=np.int64)
    try:
        found = [stat(name) for name in names]
    except OSError:  # one of them has just gone
        for row, name in enumerate(names):
            stamps[row] = _stamp_or_gone(name, stat)
        return stamps
    stamps[:, 0] = [facts.st_size for facts in found]
    stamps[:, 1] = [facts.st_mtime_ns for facts in found]
    return stamps


def _stamp_or_gone(name: str, stat: Callable[[str], os.stat_result]) -> tuple[int, int]:
    try:
        facts = stat(name)
    except OSError:
        return GONE, GONE
    return facts.st_size, facts.st_mtime_ns
