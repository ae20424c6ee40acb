"""Read and check the header of a safetensors file in plain Python, so that it costs neither torch nor the weights.

Layout of the format: 8 bytes little-endian header length, that many bytes of JSON, then the tensors' bytes without
gaps. JSON: name -> {dtype, shape, data_offsets}, and optionally `__metadata__`, a string -> string table.
"""

from __future__ import annotations

import json
import os
from math import prod
from pathlib import Path
from typing import NamedTuple

from library.errors import UserError

ITEM_BITS = {
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
    "F32": 32, "U32": 32, "I32": 32,
    "BF16": 16, "F16": 16, "U16": 16, "I16": 16,
    "F8_E5M2FNUZ": 8, "F8_E4M3FNUZ": 8, "F8_E8M0": 8, "F8_E4M3": 8, "F8_E5M2": 8,
    "I8": 8, "U8": 8, "F6_E3M2": 6, "F6_E2M3": 6, "F4": 4, "BOOL": 8,
}  # fmt: skip
"""Size of an element by its name in the format, in the order in which the reference writer lays dtypes out."""

MAX_HEADER_BYTES = 100_000_000  # the limit of the reference reader

_AGAIN = "download or copy the file again"
_FOREIGN_STARTS = (
    (b"version https://git-lfs", "is a Git LFS pointer, not the weights", "run `git lfs pull`, or download the file"),
    (
        b"PK\x03\x04",
        "is a zip archive or a PyTorch .ckpt/.pt, not safetensors",
        "give it the ending it had, or convert it",
    ),
    (b"\x80", "is a pickle (PyTorch .ckpt/.pt), not safetensors", "give it the ending it had, or convert it"),
    (b"GGUF", "is a GGUF file, not safetensors", "use the safetensors version of the model"),
    (b"<", "is a web page, not safetensors: the download was refused or needs a login", _AGAIN),
)


class TensorInfo(NamedTuple):
    """What the header says about one tensor: `dtype` by its name in the format ("F16"), and its shape."""

    dtype: str
    shape: tuple[int, ...]


def read_header(path: str | os.PathLike[str]) -> tuple[dict[str, str], dict[str, TensorInfo]]:
    """Return (metadata, tensors by name) of a safetensors file after checking that the file is whole.

    Raises UserError naming the file when it is missing, cut short, corrupt, or something else than safetensors.
    """
    path = Path(path)
    raw, data_bytes = _read_raw_header(path)
    try:
        entries = json.loads(raw, object_pairs_hook=_unique)
        metadata = entries.pop("__metadata__", {}) or {}
        spans = sorted((*entry["data_offsets"], name) for name, entry in entries.items())
        tensors = {name: TensorInfo(entry["dtype"], tuple(entry["shape"])) for name, entry in entries.items()}
        end = _check_spans(spans, tensors)
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("metadata is not text")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"the header of this safetensors file is corrupt ({error})", str(path), _AGAIN) from error
    if data_bytes != end:
        what = "cut short" if data_bytes < end else "too long"
        offset = 8 + len(raw)
        raise UserError(
            f"the safetensors file is {what}: expected {offset + end} bytes, has {offset + data_bytes}",
            where=str(path),
            fix=_AGAIN,
        )
    return metadata, tensors


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object's entries; ValueError for a name that it has twice, of which readers would take either."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f'"{next(name for name in names if names.count(name) > 1)}" is in it twice')
    return found


def _read_raw_header(path: Path) -> tuple[bytes, int]:
    """Return the header's JSON and the number of bytes that follow it."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(32)
            length = int.from_bytes(start[:8], "little")
            _check_start(path, start, size=size, length=length)
            file.seek(8)
            raw = file.read(length)
    except FileNotFoundError as error:
        raise UserError("the file does not exist", str(path), "check the path") from error
    except OSError as error:
        raise UserError(f"the file cannot be read ({error.strerror})", str(path), "check the path") from error
    return raw, size - 8 - length


def _check_start(path: Path, start: bytes, *, size: int, length: int) -> None:
    if size == 0:
        raise UserError("the file is empty", str(path), _AGAIN)
    for magic, what, fix in _FOREIGN_STARTS:
        # A header length may begin with any byte, so a foreign start only counts when no JSON header follows.
        if start.startswith(magic) and start[8:9] != b"{":
            raise UserError(f"the file {what}", str(path), fix)
    if size >= 9 and start[8:9] == b"{" and length <= MAX_HEADER_BYTES and length > size - 8:
        raise UserError(
            f"the safetensors file is cut short: its header alone needs {length + 8} bytes, the file has {size}",
            where=str(path),
            fix=_AGAIN,
        )
    if size < 10 or length > min(MAX_HEADER_BYTES, size - 8) or start[8:9] != b"{":
        raise UserError("the file is not a safetensors file", str(path), "check the path, or " + _AGAIN)


def _check_spans(spans: list[tuple[int, int, str]], tensors: dict[str, TensorInfo]) -> int:
    """Check that the tensors lie end to end and are as long as dtype and shape say; return where the last one ends."""
    position = 0
    for start, end, name in spans:
        info = tensors[name]
        if info.dtype not in ITEM_BITS:
            raise ValueError(f"unknown dtype {info.dtype} of {name}")
        if start != position or (end - start) * 8 != prod(info.shape) * ITEM_BITS[info.dtype]:
            raise ValueError(f"wrong place or length of {name}")
        position = end
    return position
