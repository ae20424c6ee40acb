"""Where batches take encoded images and captions from: memory, or the cache files beside the images."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from library.diffusion.conditioning import TextCond
from library.io import latent_cache, text_cache


class LatentStore:
    """Latents by record key, float32 (4, h, w), as the VAE gave them (not scaled)."""

    def __init__(self) -> None:
        self._entries: dict[str, latent_cache.LatentEntry | Path] = {}

    def put(self, key: str, entry: latent_cache.LatentEntry | Path) -> None:
        """Add an entry, or the path of a cache file that is known to hold it."""
        self._entries[key] = entry

    def get(self, key: str, *, flipped: bool) -> Tensor:
        """The latents of the image or of its mirror image. Raises UserError when a cache file cannot be read."""
        entry = self._entries[key]
        if isinstance(entry, Path):
            entry = latent_cache.read(entry)
        latents = entry.flipped_4hw if flipped else entry.latents_4hw
        if latents is None:
            raise KeyError(f"{key} has no mirrored latents")
        return latents

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def in_memory(self) -> bool:
        """Whether reading needs no file."""
        return not any(isinstance(entry, Path) for entry in self._entries.values())


class TextStore:
    """Encoded captions by record key, one row each, and the encoding of the empty caption for caption dropout."""

    def __init__(self, *, empty: TextCond) -> None:
        self.empty = empty
        self._entries: dict[str, TextCond | Path] = {}

    def put(self, key: str, entry: TextCond | Path) -> None:
        """Add a row (batch of 1), or the path of a cache file that is known to hold it."""
        self._entries[key] = entry

    def get(self, key: str, *, empty: bool = False) -> TextCond:
        """The float32 row of a record, or that of the empty caption. Raises UserError when a file cannot be read."""
        if empty:
            return self.empty
        entry = self._entries[key]
        return text_row(text_cache.read(entry)) if isinstance(entry, Path) else entry

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def in_memory(self) -> bool:
        """Whether reading needs no file."""
        return not any(isinstance(entry, Path) for entry in self._entries.values())


def text_row(entry: text_cache.TextEntry) -> TextCond:
    """One cached caption as a batch of 1: the hidden states of both encoders side by side, float32."""
    hidden_TD = torch.cat([entry.hidden_state1.float(), entry.hidden_state2.float()], dim=-1)
    return TextCond(hidden_TD[None], entry.pool2.float()[None])
