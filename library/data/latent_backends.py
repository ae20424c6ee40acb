"""Where a pass over the images keeps latents: in memory, or as sd-scripts' npz files beside the images."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from library.data.caching import Targets
from library.data.entry_places import EntryPaths, EntryPlaces, Seen, ids_of, image_stamps
from library.data.folder_listing import GONE
from library.data.records import PlacedImage
from library.data.stores import Entries
from library.data.table import ImageTable, text_id
from library.data.transforms import crop_info
from library.io import fingerprint, latent_cache
from library.io.fingerprint import ImageStamp
from library.io.latent_cache import CacheCheck, LatentEntry

CELL = 8
"""Pixels per latent cell along one side."""


class LatentBackend(Protocol):
    """One kind of cache during a pass; entries go by the numbers of the pass's targets."""

    def look(self, *, rank: int, world: int) -> list[CacheCheck]:
        """What is there of every entry; the ranks share the looking."""

    def place(self, number: int) -> str:
        """Where an entry lies, in words for the log."""

    def put(self, number: int, entry: LatentEntry) -> None:
        """Keep an entry. Called from one thread at a time."""

    def share(self) -> Any:
        """What other ranks have to know to read what this rank has put; can be pickled."""

    def entries(self, shared: Sequence[Any], *, right: Sequence[int], rank: int) -> Entries[LatentEntry]:
        """All entries, given what every rank shares and the numbers of those known to be right now."""


class MemoryLatents:
    """Keeps entries as they are."""

    in_memory = True

    def __init__(self, targets: Targets) -> None:
        self._total = len(targets)
        self._entries: dict[int, LatentEntry] = {}

    def look(self, *, rank: int, world: int) -> list[CacheCheck]:
        """Nothing is there yet."""
        return [CacheCheck("missing")] * self._total

    def place(self, number: int) -> str:
        """No entry has a place of its own."""
        return "memory"

    def put(self, number: int, entry: LatentEntry) -> None:
        """Keep an entry."""
        self._entries[number] = entry

    def share(self) -> Mapping[int, LatentEntry]:
        """The entries themselves."""
        return self._entries

    def entries(self, shared: Sequence[Mapping[int, LatentEntry]], *, right: Sequence[int], rank: int) -> MemoryLatents:
        """This object, with the entries of every rank."""
        for part in shared:
            self._entries |= part
        return self

    def read(self, number: int) -> LatentEntry:
        """One entry."""
        return self._entries[number]

    def has(self, numbers: np.ndarray) -> np.ndarray:
        """Which of them are there."""
        return np.fromiter((number in self._entries for number in numbers.tolist()), bool, len(numbers))


class NpzEntries:
    """Entries in files."""

    in_memory = False

    def __init__(self, paths: EntryPaths, numbers: np.ndarray) -> None:
        self._paths = paths
        self._is_there = np.zeros(len(paths), dtype=bool)
        self._is_there[numbers] = True

    def read(self, number: int) -> LatentEntry:
        """One entry."""
        return latent_cache.read(self._paths[number])

    def has(self, numbers: np.ndarray) -> np.ndarray:
        """Which of them are known to be right."""
        return self._is_there[numbers]


class NpzLatents:
    """Keeps every entry in a file of sd-scripts' format. `vae_id` names the weights; `skip_check` trusts old files."""

    def __init__(
        self, table: ImageTable, targets: Targets, *, needs_flip: np.ndarray, vae_id: str, skip_check: bool
    ) -> None:
        self._table, self._targets = table, targets
        self._needs_flip, self._vae_id, self._skip_check = needs_flip, vae_id, skip_check
        images = table.image_of[targets.first]
        self._stamps = image_stamps(table, images)
        kinds = (table.placement_of[targets.first], table.subset_of[images], needs_flip)
        made_from = (table.name_ids[images], *self._stamps.T, ids_of(kinds, self._recipe))
        self._files = EntryPlaces(
            "latents",
            [[folder] for folder in table.folders],
            folder_of=table.folder_of[images],
            made_from=made_from,
        )

    def look(self, *, rank: int, world: int) -> list[CacheCheck]:
        """Ask the folders' indexes first; look for the files that they do not know, and open them."""
        rest = self._files.confirm(rank=rank)
        images = [self._image(number) for number in rest.tolist()]
        standard = [latent_cache.latent_cache_path(image.record.path, image.record.size) for image in images]
        self._files.choose(rest, standard, identities=[latent_identity(image) for image in images])
        return self._files.checks(self._inspect, rank=rank, world=world, title="checking latents")

    def place(self, number: int) -> str:
        """Its file."""
        return self._files.paths[number]

    def put(self, number: int, entry: LatentEntry) -> None:
        """Write its file."""
        path = self._files.paths[number]
        latent_cache.write(path, entry, self._fingerprint(number, with_hash=True))
        self._files.see(number)

    def share(self) -> Seen:
        """The files' sizes and times, for the indexes."""
        return self._files.seen()

    def entries(self, shared: Sequence[Seen], *, right: Sequence[int], rank: int) -> NpzEntries:
        """The files; the first rank notes in the folders' indexes which are right."""
        numbers = np.asarray(right, dtype=np.int64)
        if rank == 0 and not self._skip_check:
            self._files.note(shared, numbers[self._stamps[numbers, 0] != GONE])
        return NpzEntries(self._files.paths, numbers)

    def _image(self, number: int) -> PlacedImage:
        return self._table[int(self._targets.first[number])]

    def _inspect(self, number: int, path: str) -> CacheCheck:
        if self._skip_check:
            return CacheCheck("valid" if os.path.exists(path) else "missing")
        try:
            expected = self._fingerprint(number, with_hash=False)
        except OSError:
            # The image has gone since the scan. Encoding it will fail and say so.
            return CacheCheck("missing")
        image = self._image(number)
        bucket = image.placement.bucket
        return latent_cache.inspect(
            path,
            expected,
            need_flipped=bool(self._needs_flip[number]),
            latent_hw=(bucket.h // CELL, bucket.w // CELL),
            image_path=image.record.path,
        )

    def _fingerprint(self, number: int, *, with_hash: bool) -> str:
        image = self._image(number)
        return self._described(image, fingerprint.image_stamp(image.record.path, with_hash=with_hash))

    def _recipe(self, number: int) -> int:
        """64 bits that stand for all that an entry depends on but the image file, and for what must be in it."""
        contents = "plain and mirrored" if self._needs_flip[number] else "plain"
        return text_id(f"{contents}\n{self._described(self._image(number), ImageStamp(0, 0))}")

    def _described(self, image: PlacedImage, stamp: ImageStamp) -> str:
        crop = crop_info(image.record.size, image.placement, flipped=False)
        return fingerprint.latent_fingerprint(
            image=stamp,
            bucket=crop.target,
            resized=crop.resized,
            crop=(crop.left, crop.top),
            vae_id=self._vae_id,
            interpolation=image.record.subset.resize_interpolation,
        )


def latent_identity(image: PlacedImage) -> tuple:
    """What the latents of an image depend on, besides the VAE; images that agree in it share an entry."""
    return image.record.path, image.placement.bucket, image.placement.resized, image.record.subset.resize_interpolation
