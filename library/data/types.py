"""What reaches the training loop: batches, and the groups of them that make up an optimizer step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from library.data.records import Skipped
from library.diffusion.conditioning import TextCond, Tokens
from library.sizes import Size


class SampleKey(NamedTuple):
    """One visit of one image within an epoch; `repeat` counts from 0."""

    record: str
    repeat: int


class Place(NamedTuple):
    """Where a sample stands in the order of its epoch, the same on any number of ranks.

    position: counted from 0 over the whole epoch. in_step: the same within its optimizer step, which has `step_size`
    samples over all ranks and micro-batches.
    """

    position: int
    in_step: int
    step_size: int


class Awaited(NamedTuple):
    """What a row of a batch waits for: the latents of a row of the table, or of its mirror image."""

    row: int
    flipped: bool


class Beside(NamedTuple):
    """An image of a batch at another of its resolutions: the row of the table, and the plain image cut to its bucket,
    uint8 (H, W, 3), with its mask, uint8 (H, W)."""

    row: int
    pixels: np.ndarray
    mask: np.ndarray | None = None


@dataclass
class Batch:
    """What one rank feeds to one forward pass: rows of one bucket.

    The first `num_real` rows are samples; rows after them are padding (copies of a real row) with weight 0, which
    give every rank the same number of rows. `sizes_B6` is float32: original h, w, crop top, left, target h, w, in
    pixels. `pixels_B3HW` is float32 in [-1, 1]; `latents_B4hw` is the unscaled output of the VAE; instead of it
    `moments_B8hw` may hold mean and log-variance of its posterior, from which a step draws. These and `text` may be
    float16 when they come from a packed cache. While a cache is being filled, `awaits` says for every row whether it
    is still to be encoded; `pixels_B3HW` then holds the plain images of those rows only. `beside` are images of the
    batch at other resolutions, to be encoded for the cache too. `failures` lists images that could not be read for
    this batch; their rows are among the padding. `places` tells for every row where its sample stands in the epoch (a
    row of padding has the place of the sample it copies). `mask_B1hw` is float32 in [0, 1], the weight of every latent
    cell in the loss, or None when no row has a mask; `control_B3HW` float32 in [-1, 1].
    """

    keys: list[SampleKey]
    num_real: int
    weight_B: Tensor
    captions: list[str]
    sizes_B6: Tensor
    bucket: Size
    pixels_B3HW: Tensor | None = None
    latents_B4hw: Tensor | None = None
    moments_B8hw: Tensor | None = None
    tokens: Tokens | None = None
    text: TextCond | None = None
    mask_B1hw: Tensor | None = None
    control_B3HW: Tensor | None = None
    failures: tuple[Skipped, ...] = ()
    awaits: tuple[Awaited | None, ...] = ()
    beside: tuple[Beside, ...] = ()
    places: tuple[Place, ...] = ()

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """A copy with every tensor on `device`; dtypes stay."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """A copy in page-locked memory; the data loader calls this when a GPU is present."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """A copy with every tensor changed, those inside tokens and text included."""
        changed: dict[str, Any] = {}
        for slot in dataclasses.fields(self):
            value = getattr(self, slot.name)
            if isinstance(value, Tensor):
                changed[slot.name] = change(value)
            elif isinstance(value, Tokens | TextCond):
                parts = [getattr(value, part.name) for part in dataclasses.fields(value)]
                changed[slot.name] = type(value)(*[None if part is None else change(part) for part in parts])
        return dataclasses.replace(self, **changed)


@dataclass
class StepGroup:
    """The micro-batches of one optimizer step on this rank.

    `samples` counts the planned samples of the whole group over all ranks: the divisor of the step's mean loss.
    """

    micro_batches: list[Batch]
    samples: int
