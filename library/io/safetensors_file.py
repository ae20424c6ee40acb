"""Tensors in safetensors files: lazy reading, and writing that streams one tensor at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from library.errors import UserError
from library.io.atomic import atomic_path
from library.io.read_back import write_checked
from library.io.safetensors_header import ITEM_BITS, TensorInfo, read_header

__all__ = ["ComputedTensors", "TensorInfo", "TensorReader", "TensorSource", "read_header", "save", "serialized"]

_DTYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8",
    torch.bool: "BOOL", torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
_LAYOUT_ORDER = {name: place for place, name in enumerate(ITEM_BITS)}


class TensorSource(Mapping[str, Tensor]):
    """Named tensors of a checkpoint file, read when asked for, with the file's text metadata; a context manager."""

    metadata: dict[str, str]

    def close(self) -> None:
        """Let go of the file; tensors already read stay valid."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class ComputedTensors(Mapping[str, Tensor]):
    """Tensors that cost work to make; `outline` lets a writer plan the file, so that it asks for each only once."""

    def outline(self, name: str) -> Tensor:
        """A meta tensor of the dtype and shape that `self[name]` will have."""
        raise TypeError(f"{type(self).__name__} must define outline")


class TensorReader(TensorSource):
    """A safetensors file as a mapping; the header is checked at once, tensors are read on access.

    With `mmap` (the default) a tensor is a private mapping of the file: it costs memory only where it is touched and
    writing to it leaves the file alone. Without, its bytes are read into memory of its own (`mmap` is slow on some
    network file systems). Raises UserError as `read_header` does.
    """

    def __init__(self, path: str | os.PathLike[str], *, mmap: bool = True) -> None:
        self.path = Path(path)
        self.metadata, self._infos = read_header(self.path)
        try:
            self._file = safe_open(self.path, framework="pt", device="cpu", backend="mmap" if mmap else "pread")
            self._file.__enter__()
        except (SafetensorError, OSError) as error:
            raise UserError(f"the file cannot be read as safetensors ({error})", str(self.path)) from error

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._infos:
            raise KeyError(name)
        return self._file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._infos)

    def __len__(self) -> int:
        return len(self._infos)

    def __contains__(self, name: object) -> bool:
        return name in self._infos

    def info(self, name: str) -> TensorInfo:
        """Return dtype name and shape from the header, without touching the tensor."""
        return self._infos[name]

    def close(self) -> None:
        self._file.__exit__(None, None, None)


def serialized(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None, *, dtype: torch.dtype | None = None
) -> Iterator[bytes | memoryview]:
    """Yield the bytes of a safetensors file: first the header, then one tensor after the other.

    `tensors` may be lazy: each is asked for twice, once for its shape and once for its bytes, and none is kept;
    ComputedTensors are asked for their outlines and once for their bytes.
    Floating-point tensors are cast to `dtype` when one is given; any device and memory layout will do. The bytes are
    those of the reference writer, except that metadata keys are sorted (there they come in random order): tensors
    lie by falling dtype size, then by name.
    """
    specs: dict[str, TensorInfo] = {}
    for name in tensors:
        tensor = tensors.outline(name) if isinstance(tensors, ComputedTensors) else tensors[name]
        assert tensor.dtype in _DTYPE_NAMES, f"{name}: {tensor.dtype} has no place in the format"
        specs[name] = TensorInfo(_DTYPE_NAMES[_stored_dtype(tensor, dtype)], tuple(tensor.shape))
    order = sorted(specs, key=lambda name: (_LAYOUT_ORDER[specs[name].dtype], name.encode()))
    yield _header_bytes(specs, order, metadata or {})
    for name in order:
        tensor = tensors[name]
        flat = tensor.detach().to(device="cpu", dtype=_stored_dtype(tensor, dtype)).contiguous().reshape(-1)
        yield memoryview(flat.view(torch.uint8).numpy())


def save(
    tensors: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    metadata: Mapping[str, str] | None = None,
    *,
    dtype: torch.dtype | None = None,
    checked: bool = False,
) -> None:
    """Write a safetensors file atomically, holding no more than one converted tensor at a time.

    Arguments as for `serialized`. `checked` reads the file back and compares it with what was written, before it takes
    the place of an older one. Raises UserError when the disk is full, the folder not writable or the file different.
    """
    pieces = serialized(tensors, metadata, dtype=dtype)
    with atomic_path(path) as temporary:
        if checked:
            write_checked(temporary, pieces)
            return
        with open(temporary, "wb") as file:
            for piece in pieces:
                file.write(piece)


def _stored_dtype(tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    return dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype


def _header_bytes(specs: Mapping[str, TensorInfo], order: list[str], metadata: Mapping[str, str]) -> bytes:
    table: dict[str, object] = {}
    if metadata:
        for key, value in metadata.items():
            assert isinstance(key, str) and isinstance(value, str), f"metadata {key!r} must be text, is {value!r}"
        table["__metadata__"] = dict(sorted(metadata.items()))
    position = 0
    for name in order:
        info = specs[name]
        count = 1
        for side in info.shape:
            count *= side
        end = position + count * ITEM_BITS[info.dtype] // 8
        table[name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data start at a multiple of 8
    return len(text).to_bytes(8, "little") + text
