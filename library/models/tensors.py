"""Lazy views of named tensors: shapes without reading, other names, several files as one."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor

from library.io.safetensors_file import TensorReader
from library.models.arch import Shape

# A progress bar of so many units whose `update(n)` is called; the tools at the command line have one.
Bars = Callable[[int], AbstractContextManager[Any]]


class _Silent:
    def update(self, count: int) -> None:
        """Nothing is shown."""


def no_bar(total: int) -> AbstractContextManager[Any]:
    """For callers that show no progress."""
    return nullcontext(_Silent())


class Watched(Mapping[str, Tensor]):
    """The same tensors; `told(1)` is called when one of them is asked for, at most `reads` times for each."""

    def __init__(self, tensors: Mapping[str, Tensor], told: Callable[[int], object], *, reads: int) -> None:
        self._tensors, self._told = tensors, told
        self._left = dict.fromkeys(tensors, reads)

    def __getitem__(self, name: str) -> Tensor:
        if self._left.get(name):
            self._left[name] -= 1
            self._told(1)
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors


class RenamedTensors(Mapping[str, Tensor]):
    """Some tensors of one or several sources under other names; nothing is read until asked for."""

    def __init__(self, places: Mapping[str, tuple[Mapping[str, Tensor], str]]) -> None:
        self._places = dict(places)

    def __getitem__(self, name: str) -> Tensor:
        source, key = self._places[name]
        return source[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def shape(self, name: str) -> Shape:
        """Shape of a tensor, from the file's header where there is one."""
        source, key = self._places[name]
        return shape_of(source, key)


def shape_of(source: Mapping[str, Tensor], key: str) -> Shape:
    """Shape of one tensor of any source, without reading it from a safetensors file."""
    if isinstance(source, TensorReader):
        return source.info(key).shape
    if isinstance(source, RenamedTensors):
        return source.shape(key)
    return tuple(source[key].shape)


def shapes_of(source: Mapping[str, Tensor]) -> dict[str, Shape]:
    """Shapes of all tensors of a source."""
    return {key: shape_of(source, key) for key in source}


def without_prefix(source: Mapping[str, Tensor], prefix: str) -> RenamedTensors:
    """The tensors whose names start with `prefix`, without it."""
    return RenamedTensors({key[len(prefix) :]: (source, key) for key in source if key.startswith(prefix)})


def joined(parts: Sequence[tuple[str, Mapping[str, Tensor]]]) -> RenamedTensors:
    """Several sources as one, each below its prefix, in order."""
    return RenamedTensors({prefix + key: (source, key) for prefix, source in parts for key in source})
