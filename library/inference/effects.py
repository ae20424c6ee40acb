"""Deep Shrink and Gradual Latent as settings of one picture, and the sizes that follow from them. No torch.

Source: gen_img.md sections 11 and 12. Sizes are (h, w), of the U-Net's maps or of latents, in latent cells.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from library.config.unsharp import Unsharp

_WHOLE = 8  # cells: sizes on the way are multiples of it, so that the U-Net can halve them


class Cells(NamedTuple):
    """The size of a map: height and width."""

    h: int
    w: int


@dataclass(frozen=True)
class DeepShrink:
    """The U-Net's maps are shrunk to `ratio` of each side before an input block, while there is much noise.

    depth_1 (0 to 8; None: no Deep Shrink) from the last timestep down to timesteps_1; depth_2 (None: nothing) below
    timesteps_1 down to timesteps_2.
    """

    depth_1: int | None = None
    timesteps_1: int = 650
    depth_2: int | None = None
    timesteps_2: int = 650
    ratio: float = 0.5

    @property
    def is_on(self) -> bool:
        """Whether anything is shrunk."""
        return self.depth_1 is not None

    def depth_at(self, t: float) -> int | None:
        """The input block before which maps are shrunk at timestep t; None where nothing is."""
        if self.depth_1 is None or t >= self.timesteps_1:
            return self.depth_1
        return self.depth_2 if t >= self.timesteps_2 else None


NO_SHRINKING = DeepShrink()


def skip_sizes(size: Cells, halves: Sequence[bool], *, depth: int | None, ratio: float) -> list[Cells]:
    """The sizes after each input block, of latents of `size`.

    halves: which blocks halve their map (a convolution of stride 2 rounds up). depth: the block before which the map
    is shrunk, rounding down.
    """
    sizes, (h, w) = [], size
    for block, halved in enumerate(halves):
        if block == depth:
            h, w = math.floor(h * ratio), math.floor(w * ratio)
        if halved:
            h, w = (h + 1) // 2, (w + 1) // 2
        sizes.append(Cells(h, w))
    return sizes


@dataclass(frozen=True)
class GradualLatent:
    """Latents start small and grow while the picture takes form; for euler_a.

    timesteps: growth begins below this one (None: no Gradual Latent). ratio: the share of each side at the start.
    ratio_step: what the share grows by, every_n_steps steps after it last grew. s_noise: factor of the noise of a step
    that changes the size. unsharp: how the latents are sharpened then, and at the start.
    """

    timesteps: int | None = None
    ratio: float = 0.5
    ratio_step: float = 0.125
    every_n_steps: int = 3
    s_noise: float = 1.0
    unsharp: Unsharp | None = None

    @property
    def is_on(self) -> bool:
        """Whether latents start small."""
        return self.timesteps is not None

    def start_size(self, full: Cells) -> Cells:
        """The size of the latents at the start, rounded down."""
        return Cells(math.floor(full.h * self.ratio), math.floor(full.w * self.ratio))

    def growth(self, full: Cells, timesteps: Sequence[float]) -> list[Cells | None]:
        """For each step, at these timesteps, the size of the latents after it where it changes them, else None.

        Sizes on the way are multiples of 8 cells, and never smaller than those before; at share 1 it is `full`.
        """
        assert self.timesteps is not None
        ratio, since, size, sizes = self.ratio, self.every_n_steps, self.start_size(full), list[Cells | None]()
        for t in timesteps:
            grown = None
            if t < self.timesteps and ratio < 1 and since >= self.every_n_steps:
                ratio, since = ratio + self.ratio_step, 0
                if ratio > 1 - 1e-6:  # a sum of tenths is not quite a whole number
                    ratio = 1.0
                grown = size = Cells(*(_grown(side, ratio, old) for side, old in zip(full, size, strict=True)))
            since += 1
            sizes.append(grown)
        return sizes


NO_GROWTH = GradualLatent()


def _grown(full: int, ratio: float, old: int) -> int:
    if ratio >= 1:
        return full
    return max(old, min(full, max(_WHOLE, int(full * ratio) // _WHOLE * _WHOLE)))
