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
    """What the cache has of an image or of its mirror image: latents (4, h, w) as the VAE gave them (not scaled), the
    loss mask (1, h, w), and the moments (8, h, w) of the posterior that the latents were drawn from, where kept.

    All are float32, latents and moments from a packed cache float16, which holds no more; the training step widens
    them.
    """

    latents_4hw: Tensor
    mask_1hw: Tensor | None = None
    moments_8hw: Tensor | None = None


class LatentStore:
    """Latents, masks and moments by row of the table of images.

    `has_mask` says of which entries the mask is used (all False when left out): a cache file may hold one that this
    run does not want. With `moments` latents come with the moments of their posterior. `is_filling`: entries that are
    not there are made when they are first used.
    """

    def __init__(
        self,
        targets: Targets,
        entries: Entries[LatentEntry],
        *,
        has_mask: np.ndarray | None = None,
        moments: bool = False,
        is_filling: bool = False,
    ) -> None:
        self._targets, self._entries = targets, entries
        self._has_mask = np.zeros(len(targets), dtype=bool) if has_mask is None else has_mask
        self.moments, self.is_filling = moments, is_filling

    def get(self, row: int, *, flipped: bool) -> CachedLatents:
        """What is cached of the image or of its mirror image. Raises UserError when a cache file cannot be read."""
        number = self.number(row)
        entry = self._entries.read(number)
        latents = entry.flipped_4hw if flipped else entry.latents_4hw
        moments = entry.flipped_moments_8hw if flipped else entry.moments_8hw
        if latents is None or (self.moments and moments is None):
            raise KeyError("the entry has no mirrored latents" if flipped else "the entry has no moments")
        return CachedLatents(latents, self._mask(number, entry, flipped), moments if self.moments else None)

    def _mask(self, number: int, entry: LatentEntry, flipped: bool) -> Tensor | None:
        if not self._has_mask[number]:
            return None
        mask_hw = small_mask(entry)
        if mask_hw is None:
            raise KeyError("the entry has no mask")
        return (mask_hw.flip(-1) if flipped else mask_hw)[None]

    def awaits(self, row: int) -> bool:
        """Whether a row's latents are still to be made, by a run that fills the cache while it trains."""
        return self.is_filling and not bool(self.has(np.array([row]))[0])

    def number(self, row: int) -> int:
        """The number of the entry that a row uses."""
        return int(self._targets.number_of[row])

    def has(self, rows: np.ndarray) -> np.ndarray:
        """For every row, bool, whether its latents are there."""
        return _has(self._targets, self._entries, rows)

    @property
    def in_memory(self) -> bool:
        """Whether batches need no file."""
        return self._entries.in_memory and not self.is_filling


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
