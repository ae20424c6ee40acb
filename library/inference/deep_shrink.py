"""Deep Shrink: the U-Net sees a large picture at a small size where its composition is decided.

At high noise the maps are shrunk before one input block, and before each output block they get the size of the skip
connection that joins them. Both are bicubic. Blocks are counted as in the original U-Net: for SDXL 0 is its first
convolution, 1, 2, 4, 5, 7 and 8 are resnets (with attention from 4 on), 3 and 6 halve. Source: gen_img.md section 11;
for the idea, Kohya 2023 (Deep Shrink).

Shape letters: B batch, C channels, h w the cells of a map.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.inference.effects import Cells, DeepShrink, skip_sizes
from library.inference.followers import BeforeCall, UNetCall
from library.inference.request import GenRequest

DOWN, MID = "down_block_additional_residuals", "mid_block_additional_residual"  # of ControlNets, in UNetCall.extra


class Shrinking:
    """The follower that does what the requests' deep_shrink says. It comes after those that add residuals."""

    def __init__(self, unet: Any) -> None:
        self._unet = unet

    @contextmanager
    def on(self, batch: Sequence[GenRequest], *, calls: int, device: torch.device) -> Iterator[BeforeCall | None]:
        """Shrink the maps of a batch, whose requests have equal settings; no hook stays on the U-Net."""
        settings = batch[0].deep_shrink
        if not settings.is_on:
            yield None
            return
        work = _Work(self._unet, settings)
        handles: list[Any] = []
        try:
            work.attach(handles)
            yield work.before_call
        finally:
            for handle in handles:
                handle.remove()


class _Work:
    """The hooks of one batch, and what they do in the call that comes."""

    def __init__(self, unet: Any, settings: DeepShrink) -> None:
        self._settings = settings
        self._inputs, self._outputs = _input_blocks(unet), _output_ends(unet)
        self._halves = [halves for _, halves in self._inputs]
        self._depth: int | None = None
        self._wanted: list[Cells] = []  # for each output block, the size that its result has to have

    def before_call(self, call: UNetCall) -> None:
        """Set the depth and the sizes for a call of the U-Net, and fit the residuals of ControlNets to them."""
        self._depth = self._settings.depth_at(float(call.t_B[0]))
        if self._depth is None:
            return
        full = Cells(*call.x_BChw.shape[-2:])
        sizes = skip_sizes(full, self._halves, depth=self._depth, ratio=self._settings.ratio)
        self._wanted = [*reversed(sizes[:-1]), full]
        if DOWN in call.extra:
            call.extra[DOWN] = [resized(one, to) for one, to in zip(call.extra[DOWN], sizes, strict=True)]
            call.extra[MID] = resized(call.extra[MID], sizes[-1])

    def attach(self, handles: list[Any]) -> None:
        """Put the hooks on the U-Net's modules, each of which joins `handles` at once."""
        for block, (module, _) in enumerate(self._inputs):
            handles.append(module.register_forward_pre_hook(self._shrinker(block)))
        for block, (module, doubles) in enumerate(self._outputs):
            if doubles:
                handles.append(module.register_forward_pre_hook(self._doubled))
            handles.append(module.register_forward_hook(self._fitter(block)))

    def _shrinker(self, block: int) -> Callable[..., Any]:
        def before(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if self._depth != block:
                return None
            return (shrunk(arguments[0], self._settings.ratio), *arguments[1:])

        return before

    def _doubled(self, _: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        # diffusers names the size to go to when a side is no multiple of 4; the original doubles, whatever comes next.
        return None if self._depth is None else arguments[:1]

    def _fitter(self, block: int) -> Callable[..., Any]:
        def after(_: nn.Module, __: Any, output: Any) -> Any:
            if self._depth is None:
                return None
            if isinstance(output, tuple):  # of attention
                return (resized(output[0], self._wanted[block]), *output[1:])
            return resized(output, self._wanted[block])

        return after


def count_blocks(unet: Any) -> list[bool]:
    """For each input block of a U-Net of diffusers, whether it halves its map."""
    return [halves for _, halves in _input_blocks(unet)]


def shrunk(x_BChw: Tensor, ratio: float) -> Tensor:
    """x at `ratio` of each side, rounded down, bicubic."""
    return F.interpolate(x_BChw.float(), scale_factor=ratio, mode="bicubic", align_corners=False).to(x_BChw.dtype)


def resized(x_BChw: Tensor, size: Cells) -> Tensor:
    """x at another size, bicubic, or x itself when it has that size."""
    if x_BChw.shape[-2:] == size:
        return x_BChw
    return F.interpolate(x_BChw.float(), size=tuple(size), mode="bicubic", align_corners=False).to(x_BChw.dtype)


def _input_blocks(unet: Any) -> list[tuple[nn.Module, bool]]:
    """The first module of each input block, and whether the block halves its map."""
    blocks: list[tuple[nn.Module, bool]] = [(unet.conv_in, False)]
    for level in unet.down_blocks:
        blocks += [(resnet, False) for resnet in level.resnets]
        blocks += [(downsampler, True) for downsampler in level.downsamplers or ()]
    return blocks


def _output_ends(unet: Any) -> list[tuple[nn.Module, bool]]:
    """The last module of each output block, and whether it doubles its map."""
    ends: list[tuple[nn.Module, bool]] = []
    for level in unet.up_blocks:
        ends += [(module, False) for module in getattr(level, "attentions", None) or level.resnets]
        if level.upsamplers:
            ends[-1] = (level.upsamplers[0], True)
    return ends
