"""Many copies of one model: a deep copy that walks the modules once and not every time."""

import functools
import io
import pickle
from types import FunctionType
from typing import Any

import torch

# What a copy shares with the original, as deepcopy has it.
_SHARED = (FunctionType, type(functools.cache(len)))


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, apart: list[Any]) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.apart = apart
        self.places: dict[int, int] = {}

    def persistent_id(self, value: Any) -> int | None:
        if not isinstance(value, (torch.Tensor, *_SHARED)):
            return None
        if id(value) not in self.places:
            self.places[id(value)] = len(self.apart)
            self.apart.append(value)
        return self.places[id(value)]


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, apart: list[Any]) -> None:
        super().__init__(file)
        self.apart, self.copies = apart, {}

    def persistent_load(self, place: int) -> Any:
        if place not in self.copies:
            self.copies[place] = _copy_of(self.apart[place])
        return self.copies[place]


def _copy_of(value: Any) -> Any:
    if isinstance(value, torch.nn.Parameter):
        return torch.nn.Parameter(value.detach().clone(), value.requires_grad)
    return value.clone() if isinstance(value, torch.Tensor) else value


class Copier:
    """Holds `original`, which must not be changed, and copies it."""

    def __init__(self, original: Any) -> None:
        self.apart: list[Any] = []
        file = io.BytesIO()
        _Pickler(file, self.apart).dump(original)
        self.pickled = file.getvalue()

    def copy(self) -> Any:
        """A deep copy: tensors that two modules share are shared in it too."""
        return _Unpickler(io.BytesIO(self.pickled), self.apart).load()
