"""Tensors that wait on the disk: results of any size are collected one by one and then written as one file."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import torch
from torch import Tensor

from library.io.atomic import explained
from library.io.safetensors_file import ComputedTensors


class _Place(NamedTuple):
    start: int
    num_bytes: int
    outline: Tensor


class Spool(ComputedTensors):
    """Named tensors in a nameless temporary file beside `target`; reading gives copies. A context manager.

    The file is gone when the spool is closed or the process ends, however it ends. Raises UserError when the disk is
    full or the folder not writable.
    """

    def __init__(self, target: str | os.PathLike[str]) -> None:
        self._target = Path(target)
        self._places: dict[str, _Place] = {}
        with explained(self._target):
            self._target.parent.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=self._target.parent)  # noqa: SIM115  closed by __exit__

    def add(self, name: str, tensor: Tensor) -> None:
        """Put a tensor of any device and layout away under a new name."""
        assert name not in self._places, name
        flat = tensor.detach().to("cpu").contiguous()
        outline = torch.empty(flat.shape, dtype=flat.dtype, device="meta")
        with explained(self._target):
            start = self._file.seek(0, os.SEEK_END)
            num_bytes = self._file.write(memoryview(flat.reshape(-1).view(torch.uint8).numpy()))
            self._file.flush()
        self._places[name] = _Place(start, num_bytes, outline)

    def outline(self, name: str) -> Tensor:
        return self._places[name].outline

    def __getitem__(self, name: str) -> Tensor:
        start, num_bytes, outline = self._places[name]
        if not num_bytes:
            return torch.empty(outline.shape, dtype=outline.dtype)
        self._file.seek(start)
        raw = bytearray(self._file.read(num_bytes))
        return torch.frombuffer(raw, dtype=outline.dtype).reshape(outline.shape)

    def __iter__(self):
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
