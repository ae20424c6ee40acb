"""Where a pass over the captions keeps their encodings: in memory, or as sd-scripts' npz files beside the images."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from library.data.entry_places import EntryPaths, EntryPlaces, Seen
from library.data.stores import Entries, text_row
from library.data.table import ImageTable, text_id
from library.diffusion.conditioning import TextCond
from library.io import fingerprint, text_cache
from library.io.latent_cache import CacheCheck
from library.io.text_cache import TextEntry


@dataclass(frozen=True)
class TextCacheOptions:
    """How to cache: `batch_size` captions per call; `width_1` is the first encoder's share of the text width.

    The rest says what an entry depends on besides its caption; `skip_check` trusts old files.
    """

    text_encoder_id: str
    width_1: int
    max_token_length: int = 75
    weighted: bool = False
    to_disk: bool = False
    batch_size: int = 8
    skip_check: bool = False


class TextBackend(Protocol):
    """One kind of cache during a pass; entries go by the numbers of the pass's targets."""

    def look(self, *, rank: int, world: int) -> list[CacheCheck]:
        """What is there of every entry; the ranks share the looking."""

    def place(self, number: int) -> str:
        """Where an entry lies, in words for the log."""

    def put(self, number: int, row: TextCond) -> None:
        """Keep an entry, a batch of 1 on the CPU."""

    def share(self) -> Any:
        """What other ranks have to know to read what this rank has put; can be pickled."""

    def entries(self, shared: Sequence[Any], *, right: Sequence[int], rank: int) -> Entries[TextCond]:
        """All entries, given what every rank shares and the numbers of those known to be right now."""


class MemoryText:
    """Keeps entries as they are, in float32."""

    in_memory = True

    def __init__(self, total: int) -> None:
        self._total = total
        self._entries: dict[int, TextCond] = {}

    def look(self, *, rank: int, world: int) -> list[CacheCheck]:
        """Nothing is there yet."""
        return [CacheCheck("missing")] * self._total

    def place(self, number: int) -> str:
        """No entry has a place of its own."""
        return "memory"

    def put(self, number: int, row: TextCond) -> None:
        """Keep an entry."""
        self._entries[number] = TextCond(row.hidden_BTD.float().clone(), row.pooled_BP.float().clone())

    def share(self) -> Mapping[int, TextCond]:
        """The entries themselves."""
        return self._entries

    def entries(self, shared: Sequence[Mapping[int, TextCond]], *, right: Sequence[int], rank: int) -> MemoryText:
        """This object, with the entries of every rank."""
        for part in shared:
            self._entries |= part
        return self

    def read(self, number: int) -> TextCond:
        """One entry."""
        return self._entries[number]

    def has(self, numbers: np.ndarray) -> np.ndarray:
        """Which of them are there."""
        return np.fromiter((number in self._entries for number in numbers.tolist()), bool, len(numbers))


class NpzTextEntries:
    """Entries in files, read as float32."""

    in_memory = False

    def __init__(self, paths: EntryPaths, numbers: np.ndarray) -> None:
        self._paths = paths
        self._is_there = np.zeros(len(paths), dtype=bool)
        self._is_there[numbers] = True

    def read(self, number: int) -> TextCond:
        """One entry."""
        return text_row(text_cache.read(self._paths[number]))

    def has(self, numbers: np.ndarray) -> np.ndarray:
        """Which of them are known to be right."""
        return self._is_there[numbers]


class NpzText:
    """Keeps every entry in a file of sd-scripts' format.

    `images` are the numbers of the images that stand for the entries, `caption_ids` (uint64) and `captions` what is
    encoded.
    """

    def __init__(
        self,
        table: ImageTable,
        images: np.ndarray,
        *,
        captions: Sequence[str],
        caption_ids: np.ndarray,
        options: TextCacheOptions,
    ) -> None:
        self._table, self._images, self._captions, self._options = table, images, captions, options
        recipe = np.full(len(images), text_id(self._described("")), dtype=np.uint64)
        self._files = EntryPlaces(
            "text",
            [[folder] for folder in table.folders],
            folder_of=table.folder_of[images],
            made_from=(table.name_ids[images], caption_ids, recipe),
        )

    def look(self, *, rank: int, world: int) -> list[CacheCheck]:
        """Ask the folders' indexes first; look for the files that they do not know, and open them."""
        rest = self._files.confirm(rank=rank)
        image_paths = [self._table.paths.text(image) for image in self._images[rest].tolist()]
        standard = [text_cache.text_cache_path(path) for path in image_paths]
        self._files.choose(rest, standard, identities=[self._captions[number] for number in rest.tolist()])
        return self._files.checks(self._inspect, rank=rank, world=world, title="checking captions")

    def place(self, number: int) -> str:
        """Its file."""
        return self._files.paths[number]

    def put(self, number: int, row: TextCond) -> None:
        """Write its file."""
        hidden, width = row.hidden_BTD[0], self._options.width_1
        entry = TextEntry(hidden[:, :width], hidden[:, width:], row.pooled_BP[0])
        text_cache.write(self._files.paths[number], entry, self._described(self._captions[number]))
        self._files.see(number)

    def share(self) -> Seen:
        """The files' sizes and times, for the indexes."""
        return self._files.seen()

    def entries(self, shared: Sequence[Seen], *, right: Sequence[int], rank: int) -> NpzTextEntries:
        """The files; the first rank notes in the folders' indexes which are right."""
        numbers = np.asarray(right, dtype=np.int64)
        if rank == 0 and not self._options.skip_check:
            self._files.note(shared, numbers)
        return NpzTextEntries(self._files.paths, numbers)

    def _inspect(self, number: int, path: str) -> CacheCheck:
        if self._options.skip_check:
            return CacheCheck("valid" if os.path.exists(path) else "missing")
        expected = self._described(self._captions[number])
        return text_cache.inspect(path, expected, num_tokens=self._options.max_token_length + 2)

    def _described(self, caption: str) -> str:
        return fingerprint.text_fingerprint(
            caption=caption,
            text_encoder_id=self._options.text_encoder_id,
            max_token_length=self._options.max_token_length,
            weighted=self._options.weighted,
        )
