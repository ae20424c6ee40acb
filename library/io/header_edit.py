"""Change the texts in a safetensors header; the tensors' bytes are copied as they are, so their hashes stay valid."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from library.errors import UserError
from library.io.atomic import atomic_path
from library.io.safetensors_header import read_header

MODEL_HASH, LEGACY_HASH = "sshs_model_hash", "sshs_legacy_hash"
_WINDOW = range(0x100000, 0x110000)  # model_files.md section 10
_CHUNK = 1 << 22


def edit_header(path: Path, *, changes: Mapping[str, str], removed: frozenset[str], target: Path | None = None) -> None:
    """Write `path` with other header texts to `target` (itself unless given), whole or not at all.

    The old short hash, which is the only one that depends on the header's length, is computed anew where it was right.
    Raises UserError for broken files, for keys to remove that are not there, and for changes of hashes.
    """
    metadata, _ = read_header(path)
    for key in (*changes, *removed):
        if key in (MODEL_HASH, LEGACY_HASH):
            raise UserError(f"{key} is computed from the tensors", str(path), "leave it: it stays valid")
    if absent := sorted(removed - metadata.keys()):
        raise UserError(f"there is no {', '.join(absent)} in the header", str(path), "look at it with --json")
    entries, start = _entries(path)
    edited = {key: value for key, value in metadata.items() if key not in removed} | dict(changes)
    if metadata.get(LEGACY_HASH) == legacy_hash(path):
        edited[LEGACY_HASH] = _windowed(path, start, _header(entries, _only_ss(edited)))
    with atomic_path(target or path) as temporary, open(path, "rb") as source, open(temporary, "wb") as file:
        file.write(_header(entries, edited))
        source.seek(start)
        shutil.copyfileobj(source, file, _CHUNK)


def data_hash(path: Path) -> str:
    """SHA-256 of the bytes after the header: `sshs_model_hash` as it should be, for files in the writer's own order."""
    _, start = _entries(path)
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        file.seek(start)
        while piece := file.read(_CHUNK):
            digest.update(piece)
    return digest.hexdigest()


def legacy_hash(path: Path) -> str:
    """`sshs_legacy_hash` as it should be: of 64 KiB at 1 MiB in a file of these tensors and only the ss_ texts."""
    metadata, _ = read_header(path)
    entries, start = _entries(path)
    return _windowed(path, start, _header(entries, _only_ss(metadata)))


def _only_ss(metadata: Mapping[str, str]) -> dict[str, str]:
    return {key: value for key, value in metadata.items() if key.startswith("ss_")}


def _entries(path: Path) -> tuple[dict[str, Any], int]:
    """The header's tensor entries in their order, and where the tensors' bytes start."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entries = json.loads(file.read(length))
    entries.pop("__metadata__", None)
    return entries, 8 + length


def _header(entries: Mapping[str, Any], metadata: Mapping[str, str]) -> bytes:
    table = ({"__metadata__": dict(sorted(metadata.items()))} if metadata else {}) | dict(entries)
    text = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _windowed(path: Path, start: int, header: bytes) -> str:
    """First 8 digits of the hash over the window of the file that `header` and the tensors' bytes make."""
    piece = header[_WINDOW.start : _WINDOW.stop]
    with open(path, "rb") as file:
        file.seek(start + max(0, _WINDOW.start - len(header)))
        piece += file.read(len(_WINDOW) - len(piece))
    return hashlib.sha256(piece).hexdigest()[:8]
