"""numpy's .npz archives as cache entries: atomic, other programs' keys kept, shapes readable without the data."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from numpy.lib import format as npy

from library.errors import UserError
from library.io.atomic import atomic_path

_ENDING = ".npy"


class BrokenArchive(Exception):
    """The file is damaged or no archive at all; the text says what reading it ran into."""


@contextmanager
def _readable() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # zip and header parsing answer damaged files with whatever they run into
        raise BrokenArchive(str(error) or type(error).__name__) from error


def read_arrays(path: str | os.PathLike[str], keys: Collection[str] | None = None) -> dict[str, np.ndarray]:
    """Read the arrays named in `keys` that the archive has (all of them with None); nothing is unpickled.

    The checksum of every array read is verified. Raises BrokenArchive.
    """
    with _readable(), np.load(path, allow_pickle=False) as archive:
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ValueError("not an npz archive")
        return {key: archive[key] for key in archive.files if keys is None or key in keys}


def keys_of(path: str | os.PathLike[str]) -> frozenset[str]:
    """The names of the arrays in an archive; none when there is no file, or a damaged one."""
    if not os.path.exists(path):
        return frozenset()
    try:
        with _readable(), zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except BrokenArchive:
        return frozenset()
    return frozenset(name.removesuffix(_ENDING) for name in names if name.endswith(_ENDING))


class Contents(NamedTuple):
    """What is in an archive: shape and CRC-32 of the stored bytes of every array, and the small arrays asked for."""

    shapes: dict[str, tuple[int, ...]]
    checksums: dict[str, int]
    arrays: dict[str, np.ndarray]


def peek(path: str | os.PathLike[str], keys: Collection[str] = ()) -> Contents:
    """Look into an archive, reading its directory, the arrays' headers and the arrays in `keys`.

    Raises BrokenArchive.
    """
    contents = Contents({}, {}, {})
    with _readable(), zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if not member.filename.endswith(_ENDING):
                continue
            key = member.filename.removesuffix(_ENDING)
            contents.checksums[key] = member.CRC
            with archive.open(member) as file:
                if key in keys:
                    contents.arrays[key] = npy.read_array(file, allow_pickle=False)
                    contents.shapes[key] = contents.arrays[key].shape
                else:
                    contents.shapes[key] = _header_shape(file)
    return contents


def write_arrays(
    path: str | os.PathLike[str],
    arrays: Mapping[str, np.ndarray],
    *,
    drop: Collection[str] = (),
    checksum_key: str | None = None,
) -> None:
    """Write `arrays` uncompressed, as numpy.savez does, and keep the other keys of an existing archive but `drop`.

    With `checksum_key` an int64 array of that name is added, holding the CRC-32 of each of `arrays` in order. A
    damaged old archive is replaced. Written atomically but not flushed to the disk: a cache can be built again.
    """
    path = Path(path)
    with atomic_path(path, durable=False) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        for key, array in arrays.items():
            _add(archive, key, array)
        if checksum_key is not None:
            checksums = [archive.getinfo(key + _ENDING).CRC for key in arrays]
            _add(archive, checksum_key, np.array(checksums, dtype=np.int64))
        for key, array in _others(path, {*arrays, *drop, checksum_key}).items():
            _add(archive, key, array)


def read_entry(
    path: str | os.PathLike[str], keys: Collection[str], *, required: Collection[str]
) -> dict[str, np.ndarray]:
    """Read `keys` of a cache file for use; raises UserError naming it when it is damaged or lacks a required key."""
    try:
        arrays = read_arrays(path, keys)
    except BrokenArchive as error:
        raise UserError(
            f"the cache file cannot be read ({error})", str(path), "delete it; it will be built again"
        ) from error
    missing = [key for key in required if key not in arrays]
    if missing:
        raise UserError(f"the cache file lacks {', '.join(missing)}", str(path), "delete it; it will be built again")
    return arrays


def _header_shape(file: IO[bytes]) -> tuple[int, ...]:
    read_header = npy.read_array_header_1_0 if npy.read_magic(file) == (1, 0) else npy.read_array_header_2_0
    return read_header(file)[0]


def _add(archive: zipfile.ZipFile, key: str, array: np.ndarray) -> None:
    with archive.open(key + _ENDING, "w", force_zip64=array.nbytes > 2**30) as file:
        npy.write_array(file, np.ascontiguousarray(array) if array.ndim else array, allow_pickle=False)


def _others(path: Path, taken: Collection[str | None]) -> dict[str, np.ndarray]:
    kept = keys_of(path) - set(taken)
    try:
        return read_arrays(path, kept) if kept else {}
    except BrokenArchive:
        return {}
