"""Where a pass over the images keeps latents: in memory, or as sd-scripts' npz files beside the images."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from library.data.cache_places import BESIDE_THE_IMAGES, CachePlace, require_writable
from library.data.caching import Targets
from library.data.entry_places import EntryPaths, EntryPlaces, Seen, ids_of, image_stamps
from library.data.folder_listing import GONE
from library.data.records import PlacedImage
from library.data.stores import Entries, small_mask
from library.data.table import ImageTable, text_id
from library.data.transforms import crop_info, decode_scale
from library.io import fingerprint, latent_cache
from library.io.fingerprint import ImageStamp
from library.io.latent_cache import CELL, CacheCheck, LatentEntry, MaskSource


class LatentBackend(Protocol):
    """One kind of cache during a pass; entries go by the numbers of the pass's targets."""

    def look(self, *, rank: int, world: int) -> list[CacheCheck]:
        """What is there of every entry; the ranks share the looking."""

    def look_again(self, number: int) -> CacheCheck:
        """What is there of an entry now: another run may have made it. Called from other threads than `put`."""

    def place(self, number: int) -> str:
        """Where an entry lies, in words for the log."""

    def prepare(self, numbers: Sequence[int]) -> None:
        """Called before entries are made, with their numbers; raises UserError when they could not be kept."""

    def put(self, number: int, entry: LatentEntry) -> None:
        """Keep an entry. Called from one thread at a time."""

    def as_kept(self, entry: LatentEntry) -> LatentEntry:
        """The entry as it will be read again."""

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

    def look_again(self, number: int) -> CacheCheck:
        """No other run has access."""
        return CacheCheck("missing")

    def place(self, number: int) -> str:
        """No entry has a place of its own."""
        return "memory"

    def prepare(self, numbers: Sequence[int]) -> None:
        """There is nothing to prepare."""

    def put(self, number: int, entry: LatentEntry) -> None:
        """Keep an entry."""
        self._entries[number] = replace(entry, mask_HW=small_mask(entry))

    def as_kept(self, entry: LatentEntry) -> LatentEntry:
        """Every value as it is."""
        return entry

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

    def __init__(self, paths: EntryPaths, numbers: np.ndarray, *, has_mask: np.ndarray, moments: bool = False) -> None:
        self._paths = paths
        self._has_mask, self._moments = has_mask, moments
        self._is_there = np.zeros(len(paths), dtype=bool)
        self._is_there[numbers] = True

    def read(self, number: int) -> LatentEntry:
        """One entry. Of one that failed, an old file may still be there: it is not right."""
        if not self._is_there[number]:
            raise KeyError(f"entry {number} is not in the cache")
        return latent_cache.read(self._paths[number], with_mask=bool(self._has_mask[number]), moments=self._moments)

    def has(self, numbers: np.ndarray) -> np.ndarray:
        """Which of them are known to be right."""
        return self._is_there[numbers]


class NpzLatents:
    """Keeps every entry in a file of sd-scripts' format. `vae_id` names the weights; `skip_check` trusts old files.

    New files go where `place` says; one beside the image that is right is used all the same. With `moments` the
    posterior's mean and log-variance are kept too.
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
        moments: bool = False,
    ) -> None:
        self._table, self._targets, self._has_mask, self._moments = table, targets, has_mask, moments
        self._needs_flip, self._vae_id, self._skip_check = needs_flip, vae_id, skip_check
        self._place = place
        images = table.image_of[targets.first]
        self._is_one_of_several = np.bincount(images, minlength=table.num_images)[images] > 1
        self._stamps = image_stamps(table, images)
        kinds = (
            table.placement_of[targets.first],
            table.subset_of[images],
            needs_flip,
            table.masks.has_text(images),
            self._decode_scales(images),
        )
        made_from = (table.name_ids[images], *self._stamps.T, self._mask_ids(images), ids_of(kinds, self._recipe))
        self._files = EntryPlaces(
            "latents", place.npz_folders(table.folders), folder_of=table.folder_of[images], made_from=made_from
        )

    def look(self, *, rank: int, world: int) -> list[CacheCheck]:
        """Ask the folders' indexes first; look for the files that they do not know, and open them."""
        rest = self._files.confirm(rank=rank)
        records = [self._image(number).record for number in rest.tolist()]
        standard = beside = [latent_cache.latent_cache_path(record.path, record.size) for record in records]
        if self._place.folder is not None:
            names = [latent_cache.standard_name(record.path, record.size) for record in records]
            usual = [Path(record.path).with_name(name) for record, name in zip(records, names, strict=True)]
            standard = list(map(self._place.npz_path, usual))
        return self._files.find(
            standard,
            self._own_path,
            self._inspect,
            beside=None if self._place.folder is None else beside,
            rank=rank,
            world=world,
            title="checking latents",
        )

    def look_again(self, number: int) -> CacheCheck:
        """Look at its file."""
        return self._files.look_again(number, self._inspect)

    def place(self, number: int) -> str:
        """Its file."""
        return self._files.paths[number]

    def prepare(self, numbers: Sequence[int]) -> None:
        """Find out whether the folders can be written to."""
        require_writable({Path(self._files.paths[number]).parent for number in numbers})

    def put(self, number: int, entry: LatentEntry) -> None:
        """Write its file."""
        path = self._files.paths[number]
        latent_cache.write(path, entry, self._fingerprint(number, with_hash=True))
        self._files.see(number)

    def as_kept(self, entry: LatentEntry) -> LatentEntry:
        """Every value as it is."""
        return entry

    def share(self) -> Seen:
        """The files' sizes and times, for the indexes."""
        return self._files.seen()

    def entries(self, shared: Sequence[Seen], *, right: Sequence[int], rank: int) -> NpzEntries:
        """The files; the first rank notes in the folders' indexes which are right."""
        numbers = np.asarray(right, dtype=np.int64)
        if rank == 0 and not self._skip_check:
            self._files.note(shared, numbers[self._stamps[numbers, 0] != GONE])
        return NpzEntries(self._files.paths, numbers, has_mask=self._has_mask, moments=self._moments)

    def _image(self, number: int) -> PlacedImage:
        return self._table[int(self._targets.first[number])]

    def _own_path(self, number: int, standard: Path) -> Path:
        image = self._image(number)
        name = latent_cache.standard_name(image.record.path, image.record.size)
        return standard.with_name(f"{Path(name).stem}_{entry_digest(image)}.npz")

    def _decode_scales(self, images: np.ndarray) -> np.ndarray:
        """`decode_scale` of every entry, int64; only images that shrink a lot are asked one by one."""
        scales = np.ones(len(images), dtype=np.int64)
        resized = np.array([placement.resized for placement in self._table.placements], dtype=np.int64).reshape(-1, 2)
        rows = self._targets.first
        shrinks = (self._table.sizes[images] > 2 * resized[self._table.placement_of[rows]]).all(axis=1)
        for number in np.flatnonzero(shrinks).tolist():
            image = self._image(number)
            scales[number] = decode_scale(image.record, image.placement.resized)
        return scales

    def _mask_ids(self, images: np.ndarray) -> np.ndarray:
        """For every entry 64 bits for its mask file as it is, uint64; 0 where there is none."""
        ids = np.zeros(len(images), dtype=np.uint64)
        for number in np.flatnonzero(self._table.masks.has_text(images)).tolist():
            path = self._table.masks.text(int(images[number]))
            try:
                ids[number] = text_id(f"{os.path.basename(path)}{fingerprint.image_stamp(path)}")
            except OSError:
                continue  # encoding the image will fail and say so
        return ids

    def _inspect(self, number: int, path: str) -> CacheCheck:
        if self._skip_check:
            return self._trusted(number, path)
        try:
            expected = self._fingerprint(number, with_hash=False)
        except OSError:
            # The image has gone since the scan. Encoding it will fail and say so.
            return CacheCheck("missing")
        image = self._image(number)
        bucket, mask = image.placement.bucket, mask_source(image)
        return latent_cache.inspect(
            path,
            expected,
            need_flipped=bool(self._needs_flip[number]),
            need_moments=self._moments,
            latent_hw=(bucket.h // CELL, bucket.w // CELL),
            image_path=image.record.path,
            mask=mask,
            mask_path=None if mask is None else image.record.mask or image.record.path,
        )

    def _trusted(self, number: int, path: str) -> CacheCheck:
        """Whether a file that is trusted is there; one of several for an image, or with more in it, is looked into."""
        flipped, mask = bool(self._needs_flip[number]), bool(self._has_mask[number])
        if not (flipped or mask or self._moments or self._is_one_of_several[number]):
            return CacheCheck("valid" if os.path.exists(path) else "missing")
        bucket = self._image(number).placement.bucket
        return latent_cache.inspect_contents(
            path,
            need_flipped=flipped,
            need_moments=self._moments,
            need_mask=mask,
            latent_hw=(bucket.h // CELL, bucket.w // CELL),
        )

    def _fingerprint(self, number: int, *, with_hash: bool) -> str:
        image = self._image(number)
        stamp, mask = fingerprint.image_stamp(image.record.path, with_hash=with_hash), None
        if image.record.mask is not None:
            mask = fingerprint.image_stamp(image.record.mask, with_hash=with_hash)
        return made_from(image, vae_id=self._vae_id, stamp=stamp, mask_stamp=mask)

    def _recipe(self, number: int) -> int:
        """64 bits that stand for all that an entry depends on but its files, and for what must be in it."""
        image, nothing = self._image(number), ImageStamp(0, 0)
        contents = "plain and mirrored" if self._needs_flip[number] else "plain"
        mask_stamp = None if image.record.mask is None else nothing
        described = made_from(image, vae_id=self._vae_id, stamp=nothing, mask_stamp=mask_stamp)
        return text_id(f"{contents}, {'with' if self._moments else 'without'} moments\n{described}")


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
        decode_scale=decode_scale(image.record, image.placement.resized),
    )


def mask_source(image: PlacedImage) -> MaskSource | None:
    """What the loss mask of an image is made from; None when it has none."""
    if image.record.mask is not None:
        return "file"
    return "alpha" if image.record.subset.alpha_mask else None


def entry_digest(image: PlacedImage) -> str:
    """8 hex digits for what an entry's name and the VAE leave open: file name, bucket, resize, filter and mask.

    Nothing in it depends on the folder or on what else the run has, so the entry is found again.
    """
    placement, record, source = image.placement, image.record, mask_source(image)
    facts: tuple = (
        Path(record.path).name,
        str(placement.bucket),
        str(placement.resized),
        record.subset.resize_interpolation,
    )
    if source is not None:
        facts = (*facts, source, Path(record.mask).name if record.mask else None)
    return hashlib.blake2b(repr(facts).encode("utf-8", "surrogatepass"), digest_size=4).hexdigest()
