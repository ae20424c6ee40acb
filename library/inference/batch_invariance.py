"""The same numbers for a picture whatever it is drawn with, bit by bit, on a CPU.

A CPU's matrix products choose their way of summing by the number of rows, so that a row's result can differ in its last
bits from what it is alone. Which products do depends on shapes, threads and processor: each shape is tried once, with
random numbers, and those whose rows are not the same in a batch as in the call of one picture are computed apart.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_WITH_WEIGHTS = (F.linear, torch.conv2d, F.conv2d)
_PRODUCTS = (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)
_AT_ONCE = "at once"
_Way = str | Callable[..., Tensor]
_verdicts: dict[tuple[int, int], dict[Any, _Way]] = {}  # by number of pictures and of threads


@contextmanager
def batch_invariant(model: nn.Module, pictures: int, *, beside: Sequence[nn.Module] = ()) -> Iterator[None]:
    """Let a model give the rows of `pictures` pictures the numbers that they get alone.

    The rows of a batch are branches of guidance, one after the other, each with a row per picture; row i belongs to
    picture i % pictures. Nothing is done for one picture, away from the CPU, or with compiled blocks.
    beside: other models that are called meanwhile, with such rows too.

    A VAE gets its latents in channels-last format: otherwise its attention lays several rows out in memory as it does
    not a single one, and what follows sums in another order.
    """
    alone = pictures == 1 or next(model.parameters()).device.type != "cpu"
    modules = [] if alone else [module for one in (model, *beside) for module in one.modules()]
    if alone or is_compiled(modules):
        yield
        return
    apart = _Apart(pictures)
    if any(_is_extended(module) for module in modules):
        with _Everywhere(apart):
            yield
        return
    # A plain model calls its products from its layers alone, and to watch these costs less than to watch everything.
    changed = [module for module in modules if isinstance(module, nn.Linear | nn.Conv2d | nn.GroupNorm)]
    for module in changed:
        module.__dict__["forward"] = _forward(module, apart)
    try:
        yield
    finally:
        for module in changed:
            del module.__dict__["forward"]


class _Apart:
    """Computes products picture by picture where a batch would change their bits."""

    def __init__(self, pictures: int) -> None:
        self.pictures = pictures
        self._known = _verdicts.setdefault((pictures, torch.get_num_threads()), {})

    def __call__(self, func: Callable[..., Tensor], args: tuple[Any, ...]) -> Tensor:
        """func(*args), whose first argument has the rows."""
        way = self.way(func, args)
        return func(*args) if way == _AT_ONCE else way(self.pictures, func, *args)  # type: ignore[operator]

    def way(self, func: Callable[..., Tensor], args: tuple[Any, ...]) -> _Way:
        """How to compute func(*args)."""
        forms = [(arg.shape, arg.stride(), arg.dtype) if isinstance(arg, Tensor) else arg for arg in args]
        key = (func, *forms)
        way = self._known.get(key)
        if way is None:
            way = self._known[key] = self._found(func, args)
        return way

    def _found(self, func: Any, args: tuple[Any, ...]) -> _Way:
        """The fastest way that gives each picture's rows the bits they have alone; what has other rows is let be."""
        if len(args[0]) % self.pictures:
            return _AT_ONCE
        g = torch.Generator().manual_seed(0)
        tried = [_random_like(arg, g) if isinstance(arg, Tensor) else arg for arg in args]
        with torch.no_grad():
            wanted = _by_picture(self.pictures, func, *tried)
            if torch.equal(func(*tried), wanted):
                return _AT_ONCE
            if func is F.linear and args[0].dim() == 2 and torch.equal(_stacked(self.pictures, func, *tried), wanted):
                return _stacked
        return _by_picture


def _by_picture(pictures: int, func: Callable[..., Tensor], x: Tensor, *rest: Any) -> Tensor:
    """func of each picture's rows in a call of their own."""
    out: Tensor | None = None
    for i in range(pictures):
        rows = slice(i, None, pictures)
        part = func(_alone(x, rows), *rest)
        if out is None:  # in memory as a batch would lie there
            last = not part.is_contiguous() and part.is_contiguous(memory_format=torch.channels_last)
            form = torch.channels_last if last else torch.contiguous_format
            out = torch.empty((len(x), *part.shape[1:]), dtype=part.dtype, memory_format=form)
        out[rows] = part
    assert out is not None, "there is a picture"
    return out


def _group_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float) -> Tensor:
    """Sums over channels that lie last in memory are divided among threads, with the pictures."""
    return F.group_norm(x, groups, weight, bias, eps)


def _norm_arguments(
    x: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> tuple[Any, ...]:
    """Those of F.group_norm as `_group_norm` takes them."""
    return x, weight, bias, num_groups, eps


def _stacked(
    pictures: int, func: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    """A linear layer of the rows (R, K) of all pictures, as a product of matrices for each picture."""
    x_PRK = x.reshape(-1, pictures, x.shape[1]).transpose(0, 1)
    weight_PKN = weight.t().expand(pictures, -1, -1)
    if bias is None:
        out_PRN = torch.bmm(x_PRK, weight_PKN)
    else:
        out_PRN = torch.baddbmm(bias.expand(*x_PRK.shape[:2], -1), x_PRK, weight_PKN)
    return out_PRN.transpose(0, 1).flatten(0, 1)


class _Everywhere(TorchFunctionMode):
    """All products of whatever is called, for models with networks and hooks.

    The first operand has a row per picture, where the second has the weights. Products of two matrices (DoRA's norms)
    are of weights alone and the same for all pictures.
    """

    def __init__(self, apart: _Apart) -> None:
        super().__init__()
        self._apart = apart

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.group_norm:
            return self._apart(_group_norm, _norm_arguments(*args, **(kwargs or {})))
        if kwargs:
            return func(*args, **kwargs)
        if func in _WITH_WEIGHTS or (func in _PRODUCTS and args[0].dim() > 2 == args[1].dim()):
            return self._apart(func, args)
        if func is torch.einsum and len(args) == 3 and args[0].startswith("..."):
            return self._apart(_einsum(args[0]), args[1:])
        return func(*args)


@functools.cache
def _einsum(equation: str) -> Callable[..., Tensor]:
    return functools.partial(torch.einsum, equation)


def is_compiled(modules: Iterable[nn.Module]) -> bool:
    """Whether one of a model's modules is compiled; replacing what it is made of would have it compiled anew."""
    return any(module._compiled_call_impl is not None for module in modules)


def _is_extended(module: nn.Module) -> bool:
    """Whether a module does something beside what its class does."""
    return "forward" in module.__dict__ or bool(module._forward_hooks or module._forward_pre_hooks)


def _forward(layer: nn.Module, apart: _Apart) -> Callable[..., Tensor]:
    if isinstance(layer, nn.GroupNorm):
        return _watched(_group_norm, (layer.weight, layer.bias, layer.num_groups, layer.eps), apart)
    if isinstance(layer, nn.Linear):
        return _watched(F.linear, (layer.weight, layer.bias), apart)
    assert isinstance(layer, nn.Conv2d) and layer.padding_mode == "zeros", "the models have no other"
    how = (layer.stride, layer.padding, layer.dilation, layer.groups)
    return _watched(F.conv2d, (layer.weight, layer.bias, *how), apart)


def _watched(func: Callable[..., Tensor], rest: tuple[Any, ...], apart: _Apart) -> Callable[[Tensor], Tensor]:
    """func(x, *rest), looked up anew when the shape of x changes."""
    shape: torch.Size | None = None
    way: Any = _AT_ONCE

    def forward(x: Tensor) -> Tensor:
        nonlocal shape, way
        if x.shape != shape:
            shape, way = x.shape, apart.way(func, (x, *rest))
        return func(x, *rest) if way is _AT_ONCE else way(apart.pictures, func, x, *rest)

    return forward


def _alone(x: Tensor, rows: slice) -> Tensor:
    """Some rows of x in memory as they are in a batch of their own: how products sum depends on that, too."""
    part = x[rows]
    if len(part) == 1:
        return part
    if x.stride(0) < max(x.stride()):  # not the outermost in memory: no model has that
        return part.contiguous()
    return torch.empty_strided(part.shape, x.stride(), dtype=x.dtype).copy_(part)


def _random_like(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal numbers in the shape, dtype and memory layout of a tensor."""
    return torch.empty_like(tensor).copy_(torch.randn(tensor.shape, generator=generator))
