"""Where a pass over the images keeps latents: in memory, or as sd-scripts' npz files beside the images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from library.data.cache_index import CacheIndex
from library.data.caching import Targets, entry_paths, inspect_all
from library.data.records import PlacedImage
from library.data.stores import Entries
from library.data.table import ImageTable
from library.data.transforms import crop_info
from library.io import fingerprint, latent_cache
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

    def __init__(self, paths: Sequence[Path], numbers: Sequence[int]) -> None:
        self._paths = list(paths)
        self._is_there = np.zeros(len(paths), dtype=bool)
        self._is_there[list(numbers)] = True

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
        images = [table[row] for row in targets.first.tolist()]
        standard = [latent_cache.latent_cache_path(image.record.path, image.record.size) for image in images]
        self._paths = list(entry_paths(standard, lambda number: latent_identity(images[number])))
        self._index = CacheIndex()
        self._foreign: set[int] = set()

    def look(self, *, rank: int, world: int) -> list[CacheCheck]:
        """Ask the folders' indexes first, and open the files that they do not know."""
        self._index.load({path.parent for path in self._paths})
        checks = inspect_all(len(self._paths), self._inspect, rank=rank, world=world, title="checking latents")
        self._foreign = {number for number, check in enumerate(checks) if check.status == "foreign"}
        return checks

    def place(self, number: int) -> str:
        """Its file."""
        return str(self._paths[number])

    def put(self, number: int, entry: LatentEntry) -> None:
        """Write its file."""
        latent_cache.write(self._paths[number], entry, self._fingerprint(number, with_hash=True))

    def share(self) -> None:
        """The others find the files by themselves."""

    def entries(self, shared: Sequence[None], *, right: Sequence[int], rank: int) -> NpzEntries:
        """The files; the first rank notes in the folders' indexes which are right."""
        if rank == 0 and not self._skip_check:
            for number in set(right) - self._foreign:
                if (expected := self._expected(number)) is not None:
                    self._index.add(self._paths[number], expected, contents=self._contents(number))
            self._index.save()
        return NpzEntries(self._paths, right)

    def _image(self, number: int) -> PlacedImage:
        return self._table[int(self._targets.first[number])]

    def _contents(self, number: int) -> str:
        return "plain and mirrored" if self._needs_flip[number] else "plain"

    def _expected(self, number: int) -> str | None:
        """The fingerprint that the entry should have; None when the image has gone since the scan."""
        try:
            return self._fingerprint(number, with_hash=False)
        except OSError:
            return None

    def _inspect(self, number: int) -> CacheCheck:
        path = self._paths[number]
        if self._skip_check:
            return CacheCheck("valid" if path.exists() else "missing")
        expected = self._expected(number)
        if expected is None:
            # Encoding the image will fail and say so.
            return CacheCheck("missing")
        if self._index.confirms(path, expected, contents=self._contents(number)):
            return CacheCheck("valid")
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
        crop = crop_info(image.record.size, image.placement, flipped=False)
        return fingerprint.latent_fingerprint(
            image=fingerprint.image_stamp(image.record.path, with_hash=with_hash),
            bucket=crop.target,
            resized=crop.resized,
            crop=(crop.left, crop.top),
            vae_id=self._vae_id,
            interpolation=image.record.subset.resize_interpolation,
        )


def latent_identity(image: PlacedImage) -> tuple:
    """What the latents of an image depend on, besides the VAE; images that agree in it share an entry."""
    return image.record.path, image.placement.bucket, image.placement.resized, image.record.subset.resize_interpolation
