"""Where batches take encoded images and captions from."""

from __future__ import annotations

from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from library.data.caching import Targets
from library.diffusion.conditioning import TextCond
from library.diffusion.masks import mask_cells
from library.io import text_cache
from library.io.latent_cache import LatentEntry

Entry = TypeVar("Entry", covariant=True)


class Entries(Protocol[Entry]):
    """Cache entries by number, in memory or on disk; can be pickled.

    `read` raises UserError when a file is damaged, KeyError when the entry is not there.
    """

    @property
    def in_memory(self) -> bool:
        """Whether reading needs no file."""

    def read(self, number: int) -> Entry:
        """One entry."""

    def has(self, numbers: np.ndarray) -> np.ndarray:
        """For every number, bool, whether there is such an entry."""


class CachedLatents(NamedTuple):
    """What a cache holds of a sample: latents as the VAE gave them (not scaled), and the loss mask, float32.

    Latents are float32, or float16 from a packed cache, which holds no more; the training step widens them.

    `moments_8hw` takes the place of a fixed latent where the cache has it: the posterior's mean and log-variance.
    """

    latents_4hw: Tensor
    mask_1hw: Tensor | None = None
    moments_8hw: Tensor | None = None


class LatentStore:
    """Latents and masks by row of the table of images. `has_mask` says of which entries the mask is used (all False
    when left out): a cache file may hold one that this run does not want."""

    def __init__(self, targets: Targets, entries: Entries[LatentEntry], *, has_mask: np.ndarray | None = None) -> None:
        self._targets, self._entries = targets, entries
        self._has_mask = np.zeros(len(targets), dtype=bool) if has_mask is None else has_mask

    def get(self, row: int, *, flipped: bool) -> CachedLatents:
        """What is cached of the image or of its mirror image. Raises UserError when a cache file cannot be read."""
        number = int(self._targets.number_of[row])
        entry = self._entries.read(number)
        latents = entry.flipped_4hw if flipped else entry.latents_4hw
        if latents is None:
            raise KeyError(f"row {row} has no mirrored latents")
        if not self._has_mask[number]:
            return CachedLatents(latents)
        mask_hw = small_mask(entry)
        if mask_hw is None:
            raise KeyError(f"row {row} has no mask")
        return CachedLatents(latents, (mask_hw.flip(-1) if flipped else mask_hw)[None])

    def has(self, rows: np.ndarray) -> np.ndarray:
        """For every row, bool, whether its latents are there."""
        return _has(self._targets, self._entries, rows)

    @property
    def in_memory(self) -> bool:
        """Whether reading needs no file."""
        return self._entries.in_memory


class TextEntries(Protocol):
    """Encoded captions by number, each with one wording or several; can be pickled. Errors as for Entries."""

    @property
    def in_memory(self) -> bool:
        """Whether reading needs no file."""

    def read(self, number: int, variant: int) -> TextCond:
        """One wording of an entry; entries of one wording ignore `variant`."""

    def has(self, numbers: np.ndarray) -> np.ndarray:
        """For every number, bool, whether there is such an entry."""


class TextStore:
    """Encoded captions by number of the image, one row each, and that of the empty caption for caption dropout.

    Variant `v` of the caption of an image lies in entry `number_of[starts[image] + v]`; both are int64.
    """

    def __init__(self, starts: np.ndarray, number_of: np.ndarray, entries: TextEntries, *, empty: TextCond) -> None:
        self._starts, self._number_of, self._entries = starts, number_of, entries
        self.empty = empty

    def get(self, image: int, *, variant: int = 0, empty: bool = False) -> TextCond:
        """The row of an image, or that of the empty caption: float32, or float16 from a packed cache.

        Raises UserError when a file cannot be read.
        """
        if empty:
            return self.empty
        assert variant < self.num_variants(image)
        return self._entries.read(int(self._number_of[self._starts[image] + variant]), variant)

    def num_variants(self, image: int) -> int:
        """How many wordings there are of the caption of an image; 0 for one that is not used."""
        return int(self._starts[image + 1] - self._starts[image])

    def has(self, images: np.ndarray) -> np.ndarray:
        """For every image, bool, whether all wordings of its caption are there."""
        missing_before = np.concatenate([[0], np.cumsum(~self._entries.has(self._number_of))])
        starts, ends = self._starts[images], self._starts[images + 1]
        return (ends > starts) & (missing_before[ends] == missing_before[starts])

    @property
    def in_memory(self) -> bool:
        """Whether reading needs no file."""
        return self._entries.in_memory


def _has(targets: Targets, entries: Entries, members: np.ndarray) -> np.ndarray:
    numbers = targets.number_of[members]
    return (numbers >= 0) & entries.has(np.maximum(numbers, 0))


def small_mask(entry: LatentEntry) -> Tensor | None:
    """The mask of an entry per latent cell, float32 (h, w)."""
    mask = entry.mask_HW
    if mask is None or mask.shape == entry.latents_4hw.shape[-2:]:
        return mask
    return mask_cells(mask)


def text_row(entry: text_cache.TextEntry) -> TextCond:
    """One cached caption as a batch of 1: the hidden states of both encoders side by side, float32."""
    hidden_TD = torch.cat([entry.hidden_state1.float(), entry.hidden_state2.float()], dim=-1)
    return TextCond(hidden_TD[None], entry.pool2.float()[None])
