"""numpy's .npz archives as cache entries: atomic, other programs' keys kept, shapes readable without the data."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
from numpy.lib import format as npy

from library.errors import UserError
from library.io.atomic import atomic_path

_ENDING = ".npy"
BROKEN = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, NotImplementedError, SyntaxError, RuntimeError)
"""What reading a damaged archive can raise."""


def read_arrays(path: str | os.PathLike[str], keys: Collection[str] | None = None) -> dict[str, np.ndarray]:
    """Read the arrays named in `keys` that the archive has (all of them with None); nothing is unpickled.

    Raises one of BROKEN for a damaged archive; the checksum of every array read is verified.
    """
    with np.load(path, allow_pickle=False) as archive:
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ValueError("not an npz archive")
        return {key: archive[key] for key in archive.files if keys is None or key in keys}


def read_shapes(path: str | os.PathLike[str]) -> tuple[dict[str, tuple[int, ...]], dict[str, int]]:
    """Return (shape, CRC-32 of the stored bytes) of every array, reading the archive's directory and array headers."""
    shapes: dict[str, tuple[int, ...]] = {}
    checksums: dict[str, int] = {}
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if not member.filename.endswith(_ENDING):
                continue
            key = member.filename.removesuffix(_ENDING)
            checksums[key] = member.CRC
            with archive.open(member) as file:
                read_array_header = (
                    npy.read_array_header_1_0 if npy.read_magic(file) == (1, 0) else npy.read_array_header_2_0
                )
                shapes[key] = read_array_header(file)[0]
    return shapes, checksums


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
    except BROKEN as error:
        raise UserError(
            f"the cache file cannot be read ({error})", str(path), "delete it; it will be built again"
        ) from error
    missing = [key for key in required if key not in arrays]
    if missing:
        raise UserError(f"the cache file lacks {', '.join(missing)}", str(path), "delete it; it will be built again")
    return arrays


def _add(archive: zipfile.ZipFile, key: str, array: np.ndarray) -> None:
    with archive.open(key + _ENDING, "w", force_zip64=array.nbytes > 2**30) as file:
        npy.write_array(file, np.ascontiguousarray(array) if array.ndim else array, allow_pickle=False)


def _others(path: Path, taken: Collection[str | None]) -> dict[str, np.ndarray]:
    if not path.exists():
        return {}
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {key: archive[key] for key in archive.files if key not in taken}
    except BROKEN:
        return {}
