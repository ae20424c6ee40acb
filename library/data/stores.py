"""Where batches take encoded images and captions from."""

from __future__ import annotations

from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from library.data.caching import Targets
from library.diffusion.conditioning import TextCond
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


class LatentStore:
    """Latents by row of the table of images, float32 (4, h, w), as the VAE gave them (not scaled)."""

    def __init__(self, targets: Targets, entries: Entries[LatentEntry]) -> None:
        self._targets, self._entries = targets, entries

    def get(self, row: int, *, flipped: bool) -> Tensor:
        """The latents of the image or of its mirror image. Raises UserError when a cache file cannot be read."""
        entry = self._entries.read(int(self._targets.number_of[row]))
        latents = entry.flipped_4hw if flipped else entry.latents_4hw
        if latents is None:
            raise KeyError(f"row {row} has no mirrored latents")
        return latents

    def has(self, rows: np.ndarray) -> np.ndarray:
        """For every row, bool, whether its latents are there."""
        return _has(self._targets, self._entries, rows)

    @property
    def in_memory(self) -> bool:
        """Whether reading needs no file."""
        return self._entries.in_memory


class TextStore:
    """Encoded captions by number of the image, one row each, and that of the empty caption for caption dropout."""

    def __init__(self, targets: Targets, entries: Entries[TextCond], *, empty: TextCond) -> None:
        self._targets, self._entries = targets, entries
        self.empty = empty

    def get(self, image: int, *, empty: bool = False) -> TextCond:
        """The float32 row of an image, or that of the empty caption. Raises UserError when a file cannot be read."""
        return self.empty if empty else self._entries.read(int(self._targets.number_of[image]))

    def has(self, images: np.ndarray) -> np.ndarray:
        """For every image, bool, whether its caption is there."""
        return _has(self._targets, self._entries, images)

    @property
    def in_memory(self) -> bool:
        """Whether reading needs no file."""
        return self._entries.in_memory


def _has(targets: Targets, entries: Entries, members: np.ndarray) -> np.ndarray:
    numbers = targets.number_of[members]
    return (numbers >= 0) & entries.has(np.maximum(numbers, 0))


def text_row(entry: text_cache.TextEntry) -> TextCond:
    """One cached caption as a batch of 1: the hidden states of both encoders side by side, float32."""
    hidden_TD = torch.cat([entry.hidden_state1.float(), entry.hidden_state2.float()], dim=-1)
    return TextCond(hidden_TD[None], entry.pool2.float()[None])
