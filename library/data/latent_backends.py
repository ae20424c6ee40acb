"""Where a pass over the images keeps latents: in memory, or as sd-scripts' npz files beside the images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from library.data.cache_index import CacheIndex
from library.data.cache_places import BESIDE_THE_IMAGES, CachePlace, require_writable
from library.data.caching import Targets, entry_paths, inspect_all, usable
from library.data.records import PlacedImage
from library.data.stores import Entries, small_mask
from library.data.table import ImageTable
from library.data.transforms import crop_info
from library.io import fingerprint, latent_cache
from library.io.fingerprint import ImageStamp
from library.io.latent_cache import CELL, CacheCheck, LatentEntry, MaskSource


class LatentBackend(Protocol):
    """One kind of cache during a pass; entries go by the numbers of the pass's targets."""

    def look(self, *, rank: int, world: int) -> list[CacheCheck]:
        """What is there of every entry; the ranks share the looking."""

    def place(self, number: int) -> str:
        """Where an entry lies, in words for the log."""

    def prepare(self, numbers: Sequence[int]) -> None:
        """Called before entries are made, with their numbers; raises UserError when they could not be kept."""

    def put(self, number: int, entry: LatentEntry) -> None:
        """Keep an entry. Called from one thread at a time."""

    def share(self) -> Any:
        """What other ranks have to know to read what this rank has put; can be pickled."""

    def entries(self, shared: Sequence[Any], *, right: Sequence[int], rank: int) -> Entries[LatentEntry]:
        """All entries, given what every rank shares and the numbers of those known to be right now."""


class MemoryLatents:
    """Keeps entries as they are, with masks made small."""

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

    def prepare(self, numbers: Sequence[int]) -> None:
        """There is nothing to prepare."""

    def put(self, number: int, entry: LatentEntry) -> None:
        """Keep an entry."""
        self._entries[number] = replace(entry, mask_HW=small_mask(entry))

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

    def __init__(self, paths: Sequence[Path], numbers: Sequence[int], *, has_mask: np.ndarray) -> None:
        self._paths = list(paths)
        self._has_mask = has_mask
        self._is_there = np.zeros(len(paths), dtype=bool)
        self._is_there[list(numbers)] = True

    def read(self, number: int) -> LatentEntry:
        """One entry."""
        return latent_cache.read(self._paths[number], with_mask=bool(self._has_mask[number]))

    def has(self, numbers: np.ndarray) -> np.ndarray:
        """Which of them are known to be right."""
        return self._is_there[numbers]


class NpzLatents:
    """Keeps every entry in a file of sd-scripts' format. `vae_id` names the weights; `skip_check` trusts old files.

    New files go where `place` says; one beside the image that is right is used all the same.
    """

    def __init__(
        self,
        table: ImageTable,
        targets: Targets,
        *,
        needs_flip: np.ndarray,
        has_mask: np.ndarray,
        vae_id: str,
        skip_check: bool,
        place: CachePlace = BESIDE_THE_IMAGES,
    ) -> None:
        self._table, self._targets, self._has_mask = table, targets, has_mask
        self._needs_flip, self._vae_id, self._skip_check = needs_flip, vae_id, skip_check
        images = [table[row] for row in targets.first.tolist()]
        standard = [latent_cache.latent_cache_path(image.record.path, image.record.size) for image in images]

        def identity(number: int) -> tuple[object, ...]:
            return latent_identity(images[number])

        self._paths = self._beside = list(entry_paths(standard, identity))
        if place.folder is not None:
            names = [latent_cache.standard_name(image.record.path, image.record.size) for image in images]
            beside = [Path(image.record.path).with_name(name) for image, name in zip(images, names, strict=True)]
            self._paths = list(entry_paths(map(place.npz_path, beside), identity))
        self._index = CacheIndex()
        self._unindexed: set[int] = set()
        self._is_beside: dict[int, bool] = {}

    def look(self, *, rank: int, world: int) -> list[CacheCheck]:
        """Ask the folders' indexes first, and open the files that they do not know."""
        self._index.load({path.parent for path in (*self._paths, *self._beside)})
        checks = inspect_all(len(self._paths), self._inspect, rank=rank, world=world, title="checking latents")
        self._unindexed = {number for number, check in enumerate(checks) if check.status == "foreign"}
        if self._beside is not self._paths:
            self._use_files_beside(checks)
        return checks

    def place(self, number: int) -> str:
        """Its file."""
        return str(self._paths[number])

    def prepare(self, numbers: Sequence[int]) -> None:
        """Find out whether the folders can be written to."""
        require_writable({self._paths[number].parent for number in numbers})

    def put(self, number: int, entry: LatentEntry) -> None:
        """Write its file."""
        latent_cache.write(self._paths[number], entry, self._fingerprint(number, with_hash=True))

    def share(self) -> None:
        """The others find the files by themselves."""

    def entries(self, shared: Sequence[None], *, right: Sequence[int], rank: int) -> NpzEntries:
        """The files; the first rank notes in the folders' indexes which are right."""
        if rank == 0 and not self._skip_check:
            for number in set(right) - self._unindexed:
                if (expected := self._expected(number)) is not None:
                    self._index.add(self._paths[number], expected, contents=self._contents(number))
            self._index.save()
        return NpzEntries(self._paths, right, has_mask=self._has_mask)

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
        check = self._inspect_file(number, self._paths[number])
        if usable(check) or self._beside is self._paths:
            self._is_beside[number] = False
            return check
        found = self._inspect_file(number, self._beside[number])
        self._is_beside[number] = usable(found)
        return found if usable(found) else check

    def _use_files_beside(self, checks: Sequence[CacheCheck]) -> None:
        """Take what was found beside the images from there; what other ranks looked at is asked for once more."""
        for number in [number for number, check in enumerate(checks) if usable(check)]:
            is_beside = self._is_beside.get(number)
            if is_beside is None:
                is_beside = not usable(self._inspect_file(number, self._paths[number]))
            if is_beside:
                self._paths[number] = self._beside[number]
                self._unindexed.add(number)

    def _inspect_file(self, number: int, path: Path) -> CacheCheck:
        if self._skip_check:
            return CacheCheck("valid" if path.exists() else "missing")
        expected = self._expected(number)
        if expected is None:
            # Encoding the image will fail and say so.
            return CacheCheck("missing")
        if self._index.confirms(path, expected, contents=self._contents(number)):
            return CacheCheck("valid")
        image = self._image(number)
        bucket, mask = image.placement.bucket, mask_source(image)
        return latent_cache.inspect(
            path,
            expected,
            need_flipped=bool(self._needs_flip[number]),
            latent_hw=(bucket.h // CELL, bucket.w // CELL),
            image_path=image.record.path,
            mask=mask,
            mask_path=None if mask is None else image.record.mask or image.record.path,
        )

    def _fingerprint(self, number: int, *, with_hash: bool) -> str:
        image = self._image(number)
        stamp, mask = fingerprint.image_stamp(image.record.path, with_hash=with_hash), None
        if image.record.mask is not None:
            mask = fingerprint.image_stamp(image.record.mask, with_hash=with_hash)
        return made_from(image, vae_id=self._vae_id, stamp=stamp, mask_stamp=mask)


def made_from(image: PlacedImage, *, vae_id: str, stamp: ImageStamp, mask_stamp: ImageStamp | None) -> str:
    """The fingerprint of an image's latents and mask, given what is known of its file and of its mask's."""
    crop = crop_info(image.record.size, image.placement, flipped=False)
    return fingerprint.latent_fingerprint(
        image=stamp,
        bucket=crop.target,
        resized=crop.resized,
        crop=(crop.left, crop.top),
        vae_id=vae_id,
        interpolation=image.record.subset.resize_interpolation,
        mask=stamp if mask_source(image) == "alpha" else mask_stamp,
    )


def mask_source(image: PlacedImage) -> MaskSource | None:
    """What the loss mask of an image is made from; None when it has none."""
    if image.record.mask is not None:
        return "file"
    return "alpha" if image.record.subset.alpha_mask else None


def latent_identity(image: PlacedImage) -> tuple:
    """What the latents of an image and its mask depend on, besides the VAE; images that agree in it share an entry."""
    record = image.record
    own = (record.path, image.placement.bucket, image.placement.resized, record.subset.resize_interpolation)
    source = mask_source(image)
    return own if source is None else (*own, source, record.mask)
