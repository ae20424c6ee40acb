"""Encoded captions in a packed cache: `text/` of the cache folder. See docs/packed_store.md.

An entry is found by its caption and the way it is encoded, so that equal captions are kept once; its shard's recipe
names the text encoders. The empty caption, which caption dropout needs, is an entry like the others: a complete cache
needs no text encoder.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from library.data.cache_places import require_writable
from library.data.caching import agreed
from library.data.packed_entries import as_tensor, narrowed
from library.data.text_backends import TextCacheOptions
from library.data.text_targets import caption_id
from library.diffusion.conditioning import TextCond
from library.errors import UserError
from library.io.latent_cache import CacheCheck
from library.io.packed_record import Layout
from library.io.packed_store import PackedStore
from library.io.packed_writer import PackedWriter
from library.io.text_cache import TextEntry

VERSION = 1
"""Raised when the meaning of an entry changes, so that older ones are built again."""

HIDDEN, POOLED = "hidden", "pool2"
"""The arrays of an entry: the hidden states of both encoders side by side (L, 2048), and the pooled vector (1280,).

Side by side, because then a row of a batch is one copy out of the mapped file.
"""


class Recipe(NamedTuple):
    """What all entries of a shard have in common: the encoders (None: nobody noted them), and the first one's width."""

    text_encoder: str | None
    width_1: int

    def text(self) -> str:
        """The JSON text that shards carry."""
        content = {"version": VERSION, "text_encoder": self.text_encoder, "width_1": self.width_1}
        return json.dumps(content, separators=(",", ":"))

    @staticmethod
    def parse(text: str) -> Recipe:
        """Read a recipe. Raises ValueError for one of another version."""
        content = json.loads(text)
        if content["version"] != VERSION:
            raise ValueError(f"version {content['version']}")
        return Recipe(content["text_encoder"], content["width_1"])


class PackedTextEntries:
    """Entries in a packed store; `positions` are theirs by number, -1 for those that are not there."""

    in_memory = False

    def __init__(self, store: PackedStore, positions: np.ndarray) -> None:
        self._store, self._positions = store, positions

    def read(self, number: int, variant: int = 0) -> TextCond:
        """One entry, a batch of 1 in the dtype it is stored in."""
        position = int(self._positions[number])
        if position < 0:
            raise KeyError(f"entry {number} is not in the cache")
        return row_of(self._store.read(position))

    def has(self, numbers: np.ndarray) -> np.ndarray:
        """Which of them are there."""
        return self._positions[numbers] >= 0


def row_of(arrays: Mapping[str, np.ndarray]) -> TextCond:
    """The arrays of a record as a batch of 1, which must not be written to; raises KeyError when one is missing."""
    return TextCond(as_tensor(arrays[HIDDEN])[None], as_tensor(arrays[POOLED])[None])


def arrays_of(row: TextCond) -> dict[str, np.ndarray]:
    """What is stored of a batch of 1: float16, or float32 for an entry that goes beyond it."""
    return narrowed({HIDDEN: row.hidden_BTD[0], POOLED: row.pooled_BP[0]})


def arrays_of_text(entry: TextEntry) -> dict[str, np.ndarray]:
    """What is stored of an npz file's entry."""
    hidden_TD = torch.cat([entry.hidden_state1.float(), entry.hidden_state2.float()], dim=-1)
    return narrowed({HIDDEN: hidden_TD, POOLED: entry.pool2})


def file_entry_of(arrays: Mapping[str, np.ndarray], *, width_1: int) -> TextEntry:
    """The arrays of a record as what an npz file holds; raises KeyError when one is missing."""
    hidden_TD = as_tensor(arrays[HIDDEN])
    return TextEntry(hidden_TD[:, :width_1], hidden_TD[:, width_1:], as_tensor(arrays[POOLED]))


class PackedText:
    """Keeps entries in a packed store. `ids` are the `caption_id`s of the pass's entries, `text_of` their captions.

    `options.text_encoder_id` "" stands for any encoders.
    """

    def __init__(
        self, ids: np.ndarray, text_of: Callable[[int], str], options: TextCacheOptions, *, folder: Path
    ) -> None:
        self.ids, self._text_of, self._options, self._folder = ids, text_of, options, folder
        empty = caption_id("", max_token_length=options.max_token_length, weighted=options.weighted)
        self.empty_id = np.array([empty], dtype=np.uint64)
        self.store = PackedStore.open(folder)
        self._writer = PackedWriter(folder, recipe=Recipe(options.text_encoder_id, options.width_1).text())

    def look(self, *, rank: int, world: int) -> list[CacheCheck]:
        """Look up all ids at once."""
        codes = agreed(self._judge(self.ids) if rank == 0 else None)
        assert codes is not None
        return [_CHECKS[code] for code in codes.tolist()]

    def place(self, number: int) -> str:
        """The store, and the caption."""
        return f"{self._folder}: {self._text_of(number)}"

    def prepare(self, numbers: Sequence[int]) -> None:
        """Find out whether the folder can be written to."""
        if numbers:
            require_writable([self._folder])

    def put(self, number: int, rows: TextCond) -> None:
        """Append it to this process's shard."""
        self._writer.append(int(self.ids[number]), arrays_of(rows), key=self._text_of(number))

    def share(self) -> None:
        """Flush what was put; the others find the shards by themselves."""
        self._writer.close()

    def entries(self, shared: Sequence[None], *, right: Sequence[int], rank: int) -> PackedTextEntries:
        """All entries that are right. Raises UserError when a run with other encoders has replaced some meanwhile."""
        self.store.refresh()
        if rank == 0:
            self.store.save_index()
        numbers = np.array(right, dtype=np.int64)
        positions = np.full(len(self.ids), -1, dtype=np.int64)
        positions[numbers] = self.store.find(self.ids[numbers])
        if not np.isin(self._judge(self.ids[numbers]), (_VALID, _FOREIGN)).all():
            raise UserError(
                "another run changed entries of this cache while it was being built",
                str(self._folder),
                "let only one run build a cache at a time, or give a run with other encoders its own --cache_dir",
            )
        return PackedTextEntries(self.store, positions)

    def empty(self, encode: Callable[[list[str]], TextCond], *, rank: int) -> TextCond:
        """The encoding of the empty caption as it is kept, made when it is not there; every rank asks for it."""
        is_there = agreed(int(self._judge(self.empty_id)[0]) in (_VALID, _FOREIGN))
        position = int(self.store.find(self.empty_id)[0])
        if is_there and position >= 0:
            row = row_of(self.store.read(position))
            return TextCond(row.hidden_BTD.clone(), row.pooled_BP.clone())
        arrays = arrays_of(encode([""]).to("cpu"))
        if rank == 0:
            require_writable([self._folder])
            self._writer.append(int(self.empty_id[0]), arrays)
        return row_of(arrays)

    def _judge(self, ids: np.ndarray) -> np.ndarray:
        """The code of every entry, a number in the list of checks (int64)."""
        codes = np.full(len(ids), _MISSING, dtype=np.int64)
        positions = self.store.find(ids)
        there = np.flatnonzero(positions >= 0)
        if not len(there):
            return codes
        layouts, which = self.store.layouts(positions[there])
        num_tokens = self._options.max_token_length + 2
        fits = np.array([_fits(layout, num_tokens) for layout in layouts], dtype=bool)[which]
        of_recipe = np.array([self._recipe_code(text) for text in self.store.recipes], dtype=np.int64)
        codes[there] = np.where(fits, of_recipe[self.store.recipe_of(positions[there])], _TOO_LONG)
        return codes

    def _recipe_code(self, text: str) -> int:
        try:
            encoder = Recipe.parse(text).text_encoder
        except (ValueError, KeyError, TypeError):
            return _OTHER_VERSION
        if encoder is None:
            return _FOREIGN
        is_right = self._options.skip_check or encoder == self._options.text_encoder_id
        return _VALID if is_right or not self._options.text_encoder_id else _OTHER_ENCODER


_CHECKS = (
    CacheCheck("missing"),
    CacheCheck("valid"),
    CacheCheck("foreign"),
    CacheCheck("stale", ("text encoder changed",)),
    CacheCheck("stale", ("format version changed",)),
    CacheCheck("stale", ("max token length changed",)),
)
_MISSING, _VALID, _FOREIGN, _OTHER_ENCODER, _OTHER_VERSION, _TOO_LONG = range(len(_CHECKS))


def _fits(layout: Layout, num_tokens: int) -> bool:
    """Whether entries of this layout are encoded captions of `num_tokens` positions."""
    if not {HIDDEN, POOLED} <= layout.fields.keys():
        return False
    hidden, pooled = layout.fields[HIDDEN].shape, layout.fields[POOLED].shape
    return len(hidden) == 2 and hidden[0] == num_tokens and len(pooled) == 1
