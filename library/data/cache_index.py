"""One small file per image folder that says which cache files are known to be right, so that they stay unopened.

Opening and reading 100,000 npz files takes the better part of a minute; a `stat` of each takes a second. The index
only ever confirms: a cache file that it does not know, or whose size or time has changed, or that should have been
made from something else, is opened and judged as without an index. Losing the index costs time and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from library.errors import UserError
from library.io.atomic import atomic_path
from library.log import get_logger

log = get_logger(__name__)

FILE_NAME = ".sdxl_cache_index.json"
VERSION = 1


class Known(NamedTuple):
    """A cache file as it was when it was found right: bytes, time, and a digest of what it was made from."""

    size: int
    mtime_ns: int
    made_from: str


class CacheIndex:
    """The indexes of all folders that a pass touches, read on first use."""

    def __init__(self) -> None:
        self._folders: dict[Path, dict[str, Known]] = {}
        self._changed: set[Path] = set()

    def load(self, folders: Iterable[Path]) -> None:
        """Read the indexes of `folders`; a missing or damaged one counts as empty."""
        for folder in folders:
            self._folders.setdefault(folder, dict(_read(folder)))

    def confirms(self, path: Path, fingerprint: str, *, contents: str = "") -> bool:
        """Whether the file is the one that was found right for this fingerprint and these contents."""
        known = self._folders.get(path.parent, {}).get(path.name)
        return known is not None and known == _facts(path, fingerprint, contents)

    def add(self, path: Path, fingerprint: str, *, contents: str = "") -> None:
        """Note that the file, as it is now, is right."""
        facts = _facts(path, fingerprint, contents)
        entries = self._folders.setdefault(path.parent, {})
        if facts is not None and entries.get(path.name) != facts:
            entries[path.name] = facts
            self._changed.add(path.parent)

    def save(self) -> None:
        """Write the indexes that have changed. A folder that cannot be written to goes without."""
        for folder in sorted(self._changed):
            text = json.dumps({"version": VERSION, "files": self._folders[folder]}, separators=(",", ":"))
            try:
                with atomic_path(folder / FILE_NAME, durable=False) as temporary:
                    temporary.write_text(text, encoding="utf-8")
            except (UserError, OSError) as error:
                log.debug("no cache index in %s: %s", folder, error)
        self._changed.clear()


def _read(folder: Path) -> Iterator[tuple[str, Known]]:
    try:
        content = json.loads((folder / FILE_NAME).read_text(encoding="utf-8"))
        if content["version"] != VERSION:
            return
        entries = [(name, Known(*facts)) for name, facts in content["files"].items()]
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return
    yield from entries


def _facts(path: Path, fingerprint: str, contents: str) -> Known | None:
    try:
        stat = os.stat(path)
    except OSError:
        return None
    digest = hashlib.blake2b(f"{contents}\n{fingerprint}".encode("utf-8", "surrogatepass"), digest_size=12)
    return Known(stat.st_size, stat.st_mtime_ns, digest.hexdigest())
