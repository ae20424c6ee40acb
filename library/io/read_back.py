"""What has been written is read again and compared: a disk or a network share can lose bytes without saying so."""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path

from library.errors import UserError

_CHUNK = 1 << 24


def write_checked(path: Path, pieces: Iterable[bytes | memoryview]) -> None:
    """Write `pieces` one after the other, then read the file and compare each piece's length and CRC-32.

    No piece is kept: only its checksum is. Raises UserError where the file differs, and OSError as writing does.
    """
    written: list[tuple[int, int]] = []
    with open(path, "wb") as file:
        for piece in pieces:
            file.write(piece)
            written.append((len(piece), zlib.crc32(piece)))
        file.flush()
        os.fsync(file.fileno())
        _drop_cache(file.fileno())
    if path.stat().st_size != sum(length for length, _ in written):
        raise _differs(path, f"it has {path.stat().st_size} bytes")
    start = 0
    with open(path, "rb") as file:
        for length, checksum in written:
            if _checksum(file, length) != checksum:
                raise _differs(path, f"in bytes {start} to {start + length}")
            start += length


def check_archive(path: Path) -> None:
    """Read a file of `torch.save` and compare each record with the CRC-32 that was stored while writing.

    Raises UserError where one differs or the archive is torn.
    """
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
        _drop_cache(file.fileno())
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except zipfile.BadZipFile as error:
        raise _differs(path, str(error)) from error
    if broken is not None:
        raise _differs(path, f"in {broken}")


def _checksum(file, length: int) -> int:
    value = 0
    while length:
        chunk = file.read(min(length, _CHUNK))
        if not chunk:
            return -1
        value = zlib.crc32(chunk, value)
        length -= len(chunk)
    return value


def _drop_cache(descriptor: int) -> None:
    """Make the next read come from the disk and not from memory, where the system can do that."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def _differs(path: Path, where: str) -> UserError:
    return UserError(
        f"the file read back is not what was written ({where})",
        where=str(path),
        fix="the disk or its connection loses data: save to another one",
    )
