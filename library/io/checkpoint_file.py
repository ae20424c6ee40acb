"""Open any checkpoint file that may hold weights: safetensors, or PyTorch's pickles read without running code."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from library.errors import UserError
from library.io.safetensors_file import TensorReader, TensorSource

_PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x04", b"\x80\x05")  # zip (torch >= 1.6) and legacy files


class StateDict(TensorSource):
    """Tensors of a PyTorch file; `metadata` holds its `epoch` and `global_step` as text when it has them."""

    def __init__(self, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
        self._tensors: Mapping[str, Tensor] = tensors
        self.metadata = metadata

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def close(self) -> None:
        self._tensors = {}


def read_checkpoint(path: str | os.PathLike[str], *, mmap: bool = True) -> TensorSource:
    """Open `path` as a mapping from names to tensors; what the file is decides, not its ending.

    PyTorch files are read with weights-only loading (memory-mapped where the format allows); a `state_dict` inside
    is used, entries that are not tensors are left out. Raises UserError for files that are missing, cut short,
    foreign, or that would need to run code.
    """
    path = Path(path)
    if path.is_file():
        with open(path, "rb") as file:
            start = file.read(9)
        # A safetensors header length could begin with 0x80, but then its JSON follows at byte 8.
        if start.startswith(_PICKLE_STARTS) and start[8:9] != b"{":
            return _read_pickle(path, mmap=mmap and start.startswith(b"PK"))
    return TensorReader(path, mmap=mmap)


def _read_pickle(path: Path, *, mmap: bool) -> StateDict:
    try:
        if mmap and path.suffix != ".safetensors":  # given a path, torch.load believes that ending
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        else:
            with open(path, "rb") as file:
                content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            "the checkpoint holds more than tensors; it is not opened because doing so could run code",
            where=str(path),
            fix="convert it to safetensors with the program it came from",
        ) from error
    except Exception as error:  # the unpickler answers damaged files with whatever it runs into
        raise UserError(
            f"the checkpoint cannot be read ({(str(error) or type(error).__name__).splitlines()[0]})",
            where=str(path),
            fix="download or copy the file again",
        ) from error
    content = content if isinstance(content, dict) else {}
    inner = content.get("state_dict")
    table = inner if isinstance(inner, dict) else content
    tensors = {name: value for name, value in table.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if not tensors:
        raise UserError("the checkpoint holds no tensors", str(path), "check that it is a model file")
    return StateDict(tensors, {key: str(content[key]) for key in ("epoch", "global_step") if key in content})
