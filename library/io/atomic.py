"""Files appear whole or not at all: written under a temporary name in the same folder, then renamed."""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from library.errors import UserError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}


@contextmanager
def atomic_path(final: str | os.PathLike[str], *, durable: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside `final` which becomes `final` when the block ends, or vanishes when it raises.

    Folders on the way are made. A symlink is written through. `durable` flushes to the disk before the rename; leave
    it out for files that can be made again (thousands of cache entries), where a file torn by a power cut is found
    and rebuilt. Raises UserError when the disk is full or the folder is not writable.
    """
    target = Path(os.path.realpath(final))
    with explained(Path(final)):
        target.parent.mkdir(parents=True, exist_ok=True)
        # The name ends in .tmp so that no scan by extension ever picks up half a file.
        temporary = target.with_name(f".{target.name[-100:]}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
        try:
            yield temporary
            if durable:
                _flush(temporary)
            os.replace(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        if durable:
            _flush_folder(target.parent)


@contextmanager
def atomic_folder(final: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary folder beside `final` which replaces `final` when the block ends, or vanishes when it raises.

    An older `final` is moved aside first and removed last, so that at every moment one of the two is complete.
    """
    target = Path(os.path.realpath(final))
    with explained(Path(final)):
        target.parent.mkdir(parents=True, exist_ok=True)
        token = f"{os.getpid()}-{secrets.token_hex(4)}"
        temporary = target.with_name(f".{target.name[-100:]}.{token}.tmp")
        previous = target.with_name(f".{target.name[-100:]}.{token}.old")
        temporary.mkdir()
        try:
            yield temporary
            for path in sorted(temporary.rglob("*")):
                if path.is_file():
                    _flush(path)
            if target.exists():
                os.rename(target, previous)
            os.rename(temporary, target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            if previous.exists() and not target.exists():
                os.rename(previous, target)
            raise
        _flush_folder(target.parent)
        shutil.rmtree(previous, ignore_errors=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` as UTF-8 with Unix line ends, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: str | os.PathLike[str], value: object) -> None:
    """Write `value` as indented UTF-8 JSON, atomically. NaN and infinity are refused: they are not JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


@contextmanager
def explained(path: Path, *, left_behind: str = "no half-written file was left behind") -> Iterator[None]:
    """Turn the operating system's refusals to write into sentences for the user; `left_behind` says what is there."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise UserError(
                "no space left on the disk while writing",
                where=str(path),
                fix=f"free some space or choose another folder; {left_behind}",
            ) from error
        if error.errno in _FORBIDDEN:
            raise UserError(
                f"the file cannot be written ({error.strerror})",
                where=str(path),
                fix="check the permissions of the folder or choose another one",
            ) from error
        raise


def _flush(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    """Make the rename itself durable; Windows cannot open folders and needs no such step."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
