"""Encodes every image once and keeps the latents, in memory or as sd-scripts' npz files beside the images."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from library.data.cache_places import BESIDE_THE_IMAGES, CachePlace
from library.data.caching import CacheReport, Targets, chunked, exchange, group_targets, stale_entries, usable
from library.data.latent_backends import CELL, LatentBackend, MemoryLatents, NpzLatents
from library.data.packed_latents import PackedLatents
from library.data.pixels import to_mask, to_pixels
from library.data.progress import progress_bar
from library.data.records import READ_ERRORS, PlacedImage, Skipped
from library.data.stores import LatentStore
from library.data.table import ImageTable, text_id
from library.data.transforms import apply_crop, apply_crop_to_mask, crop_info, read_pictures
from library.diffusion.crops import legacy_crop_ltrb
from library.io.latent_cache import CacheCheck, LatentEntry
from library.seeds import derive_seed

DECODERS = 4
"""Threads that decode images while the VAE works; decoding releases Python's lock."""

LatentEncoder = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(pixels_B3HW in [-1, 1], posterior noise_B4hw), both float32 on the CPU -> (unscaled latents_B4hw, finite_B bool)."""


@dataclass(frozen=True)
class LatentCacheOptions:
    """How to cache: `batch_size` images per VAE call; `vae_id` names the weights; `skip_check` trusts old files.

    `place` is where entries on disk lie.
    """

    vae_id: str
    to_disk: bool = False
    batch_size: int = 1
    skip_check: bool = False
    place: CachePlace = BESIDE_THE_IMAGES


class Decoded(NamedTuple):
    """An image cut to its bucket, uint8 (H, W, 3), and its mask, uint8 (H, W)."""

    pixels: np.ndarray
    mask: np.ndarray | None


class Built(NamedTuple):
    """What a rank brought about: entries by number, what the others need to read them, and failures."""

    numbers: list[int]
    shared: Any
    failed: list[Skipped]


def build_latents(
    table: ImageTable,
    encode: Callable[[], LatentEncoder],
    *,
    options: LatentCacheOptions,
    rank: int = 0,
    world: int = 1,
) -> tuple[LatentStore, CacheReport]:
    """Make the latents of the images in use available to every rank and say what had to be done.

    `encode` is called once, and only when something must be encoded. Latents are a sample of the VAE's posterior
    whose noise is derived from the record's key, so they depend neither on batch nor on rank. An image that cannot be
    decoded or has no finite latents is in the report's `failed` and absent from the store. With `to_disk` each entry
    is written as soon as its batch is done, so an interrupted pass goes on where it stopped. No subset may crop at
    random.
    """
    assert not any(subset.random_crop for subset in table.subsets), "a cached image has one crop"
    work = LatentPass(table, options)
    checks = work.backend.look(rank=rank, world=world)
    work.backend.prepare([number for number, check in enumerate(checks) if not usable(check)])
    chunks = _chunks(work, checks, options.batch_size)
    parts = exchange(_build(work, chunks, encode, rank=rank, world=world))
    report = CacheReport(stale=stale_entries(work.backend.place, checks))
    reused = [number for number, check in enumerate(checks) if usable(check)]
    built = sorted(number for part in parts for number in part.numbers)
    report.built, report.reused = len(built), len(reused)
    report.failed = [failure for part in parts for failure in part.failed]
    entries = work.backend.entries([part.shared for part in parts], right=[*reused, *built], rank=rank)
    return LatentStore(work.targets, entries, has_mask=work.has_mask), report


class LatentPass:
    """What a pass works on: the distinct entries, which of them need the mirror image, and where they are kept."""

    def __init__(self, table: ImageTable, options: LatentCacheOptions) -> None:
        self.table = table
        self.targets = _targets(table)
        self.needs_flip = np.zeros(len(self.targets), dtype=bool)
        rows = table.rows
        flips = np.array([subset.flip_aug for subset in table.subsets], dtype=bool)
        flips = flips[table.subset_of[table.image_of[rows]]]
        self.needs_flip[self.targets.number_of[rows[flips]]] = True
        self.has_mask = mask_ids(table)[self.targets.first] != 0
        self.backend = self._backend(options)

    def _backend(self, options: LatentCacheOptions) -> LatentBackend:
        if not options.to_disk:
            return MemoryLatents(self.targets)
        facts: dict[str, Any] = {
            "needs_flip": self.needs_flip,
            "has_mask": self.has_mask,
            "vae_id": options.vae_id,
            "skip_check": options.skip_check,
        }
        if options.place.store == "packed":
            return PackedLatents(self.table, self.targets, folder=options.place.latents, **facts)
        return NpzLatents(self.table, self.targets, place=options.place, **facts)

    def image(self, number: int) -> PlacedImage:
        """The image that stands for an entry."""
        return self.table[int(self.targets.first[number])]


def _targets(table: ImageTable) -> Targets:
    """Uses of one file that are resized, cut, filtered and masked alike share an entry."""
    rows = table.rows
    filters = [subset.resize_interpolation for subset in table.subsets]
    known = sorted(set(filters), key=str)
    filter_of = np.array([known.index(name) for name in filters], dtype=np.int64)
    images = table.image_of[rows]
    own = (table.path_ids[images], table.placement_of[rows], filter_of[table.subset_of[images]])
    return group_targets(rows, (*own, mask_ids(table)[rows]), total=len(table))


def mask_ids(table: ImageTable) -> np.ndarray:
    """For every row, uint64: 0 without a loss mask, 1 for the image's own alpha, else what stands for the mask file."""
    by_alpha = np.array([subset.alpha_mask for subset in table.subsets], dtype=bool)
    ids = by_alpha[table.subset_of].astype(np.uint64)
    from_file = np.array([subset.mask_dir is not None for subset in table.subsets], dtype=bool)[table.subset_of]
    for image in np.flatnonzero(from_file).tolist():
        ids[image] = text_id(table.masks[image] or "")
    return ids[table.image_of]


def _chunks(work: LatentPass, checks: Sequence[CacheCheck], batch_size: int) -> list[Sequence[int]]:
    """Numbers of the entries to encode, in batches of one bucket, smallest buckets first."""
    groups: defaultdict[tuple, list[int]] = defaultdict(list)
    for number, check in enumerate(checks):
        if not usable(check):
            bucket = work.table.placement(int(work.targets.first[number])).bucket
            groups[bucket.area, bucket, bool(work.needs_flip[number])].append(number)
    return [chunk for key in sorted(groups) for chunk in chunked(groups[key], batch_size)]


def _build(
    work: LatentPass,
    chunks: Sequence[Sequence[int]],
    encode: Callable[[], LatentEncoder],
    *,
    rank: int,
    world: int,
) -> Built:
    """Encode this rank's chunks, decoding ahead in the background."""
    numbers: list[int] = []
    failed: list[Skipped] = []
    mine = chunks[rank::world]
    if mine:
        encoder = encode()
        title = "caching latents" if world == 1 else f"caching latents, process {rank + 1} of {world}"
        with progress_bar(sum(map(len, mine)), title=title) as bar:
            for chunk, decoded in _decoded(work, mine):
                good = []
                for number, pictures in zip(chunk, decoded, strict=True):
                    if isinstance(pictures, Skipped):
                        failed.append(pictures)
                    else:
                        good.append((number, pictures))
                if good:
                    _encode_chunk(work, good, encoder, numbers=numbers, failed=failed)
                bar.update(len(chunk))
    return Built(numbers, work.backend.share(), failed)


def _decoded(
    work: LatentPass, chunks: Sequence[Sequence[int]]
) -> Iterator[tuple[Sequence[int], list[Decoded | Skipped]]]:
    """Each chunk with its images; the next chunk is decoded while this one is worked on."""
    with ThreadPoolExecutor(DECODERS) as pool:
        waiting: list[list[Future]] = []
        for position, chunk in enumerate(chunks):
            for ahead in chunks[position + len(waiting) : position + 2]:
                waiting.append([pool.submit(_decode, work.image(number)) for number in ahead])
            yield chunk, [future.result() for future in waiting.pop(0)]


def _decode(image: PlacedImage) -> Decoded | Skipped:
    record, filter_name = image.record, image.record.subset.resize_interpolation
    try:
        crop = crop_info(record.size, image.placement, flipped=False)
        pixels, mask, _ = read_pictures(record, with_control=False)
        if mask is not None:
            mask = apply_crop_to_mask(mask, crop, interpolation=filter_name)
        return Decoded(apply_crop(pixels, crop, interpolation=filter_name), mask)
    except READ_ERRORS as error:
        return Skipped.because_of(record.path, error)


def _encode_chunk(
    work: LatentPass,
    good: Sequence[tuple[int, Decoded]],
    encoder: LatentEncoder,
    *,
    numbers: list[int],
    failed: list[Skipped],
) -> None:
    images = [work.image(number) for number, _ in good]
    pixels_B3HW = torch.stack([to_pixels(decoded.pixels) for _, decoded in good])
    latents_B4hw, finite_B = encoder(pixels_B3HW, posterior_noise(images, "plain"))
    flipped_B4hw = None
    if work.needs_flip[good[0][0]]:
        flipped_B4hw, also_finite_B = encoder(pixels_B3HW.flip(-1), posterior_noise(images, "flipped"))
        finite_B = finite_B & also_finite_B
    for position, (number, decoded) in enumerate(good):
        image = images[position]
        if not finite_B[position]:
            failed.append(Skipped(image.record.path, "the VAE gives no finite latents, in float32 neither"))
            continue
        entry = LatentEntry(
            latents_4hw=latents_B4hw[position].float().cpu().clone(),
            flipped_4hw=None if flipped_B4hw is None else flipped_B4hw[position].float().cpu().clone(),
            original=image.record.size,
            crop_ltrb=legacy_crop_ltrb(image.placement.bucket, image.record.size),
            mask_HW=None if decoded.mask is None else to_mask(decoded.mask),
        )
        work.backend.put(number, entry)
        numbers.append(number)


def posterior_noise(images: Sequence[PlacedImage], purpose: str) -> Tensor:
    """Standard normal noise (B, 4, h, w) that depends on each record's key and on nothing else."""
    bucket = images[0].placement.bucket
    rows = []
    for image in images:
        generator = torch.Generator().manual_seed(derive_seed("latent", purpose, image.record.key))
        rows.append(torch.randn(4, bucket.h // CELL, bucket.w // CELL, generator=generator))
    return torch.stack(rows)
