"""Encodes every image once and keeps the latents, in memory or as sd-scripts' npz files beside the images."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from library.data.background import Behind, ahead, num_helpers
from library.data.caching import CacheReport, Targets, chunked, exchange, group_targets, stale_entries, usable
from library.data.latent_backends import CELL, LatentBackend, MemoryLatents, NpzLatents
from library.data.pixels import to_pixels
from library.data.progress import progress_bar
from library.data.records import READ_ERRORS, PlacedImage, Skipped
from library.data.stores import LatentStore
from library.data.table import ImageTable
from library.data.transforms import apply_crop, crop_info, read_record
from library.diffusion.crops import legacy_crop_ltrb
from library.io.latent_cache import CacheCheck, LatentEntry
from library.seeds import derive_seed

WAITING_CHUNKS = 4
"""Encoded batches that wait to be stored, at most; the encoder waits when the disk is that far behind."""

LatentEncoder = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(pixels_B3HW in [-1, 1], posterior noise_B4hw), both float32 on the CPU -> (unscaled latents_B4hw, finite_B bool)."""


@dataclass(frozen=True)
class LatentCacheOptions:
    """How to cache: `batch_size` images per VAE call; `vae_id` names the weights; `skip_check` trusts old files."""

    vae_id: str
    to_disk: bool = False
    batch_size: int = 1
    skip_check: bool = False


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
    work = _Pass(table, options)
    checks = work.backend.look(rank=rank, world=world)
    chunks = _chunks(work, checks, options.batch_size)
    parts = exchange(_build(work, chunks, encode, rank=rank, world=world))
    report = CacheReport(stale=stale_entries(work.backend.place, checks))
    reused = [number for number, check in enumerate(checks) if usable(check)]
    built = sorted(number for part in parts for number in part.numbers)
    report.built, report.reused = len(built), len(reused)
    report.failed = [failure for part in parts for failure in part.failed]
    entries = work.backend.entries([part.shared for part in parts], right=[*reused, *built], rank=rank)
    return LatentStore(work.targets, entries), report


class _Pass:
    """What a pass works on: the distinct entries, which of them need the mirror image, and where they are kept."""

    def __init__(self, table: ImageTable, options: LatentCacheOptions) -> None:
        self.table = table
        self.targets = _targets(table)
        self.needs_flip = np.zeros(len(self.targets), dtype=bool)
        rows = table.rows
        flips = np.array([subset.flip_aug for subset in table.subsets], dtype=bool)
        flips = flips[table.subset_of[table.image_of[rows]]]
        self.needs_flip[self.targets.number_of[rows[flips]]] = True
        self.backend: LatentBackend = MemoryLatents(self.targets)
        if options.to_disk:
            self.backend = NpzLatents(
                table,
                self.targets,
                needs_flip=self.needs_flip,
                vae_id=options.vae_id,
                skip_check=options.skip_check,
            )

    def image(self, number: int) -> PlacedImage:
        """The image that stands for an entry."""
        return self.table[int(self.targets.first[number])]


def _targets(table: ImageTable) -> Targets:
    """Uses of one file that are resized, cut and filtered alike share an entry."""
    rows = table.rows
    filters = [subset.resize_interpolation for subset in table.subsets]
    known = sorted(set(filters), key=str)
    filter_of = np.array([known.index(name) for name in filters], dtype=np.int64)
    images = table.image_of[rows]
    columns = (table.path_ids[images], table.placement_of[rows], filter_of[table.subset_of[images]])
    return group_targets(rows, columns, total=len(table))


def _chunks(work: _Pass, checks: Sequence[CacheCheck], batch_size: int) -> list[Sequence[int]]:
    """Numbers of the entries to encode, in batches of one bucket, smallest buckets first."""
    groups: defaultdict[tuple, list[int]] = defaultdict(list)
    for number, check in enumerate(checks):
        if not usable(check):
            bucket = work.table.placement(int(work.targets.first[number])).bucket
            groups[bucket.area, bucket, bool(work.needs_flip[number])].append(number)
    return [chunk for key in sorted(groups) for chunk in chunked(groups[key], batch_size)]


def _build(
    work: _Pass,
    chunks: Sequence[Sequence[int]],
    encode: Callable[[], LatentEncoder],
    *,
    rank: int,
    world: int,
) -> Built:
    """Encode this rank's chunks: images are decoded ahead of the encoder, entries are stored behind it."""
    numbers: list[int] = []
    failed: list[Skipped] = []
    mine = chunks[rank::world]
    if mine:
        encoder = encode()
        title = "caching latents" if world == 1 else f"caching latents, process {rank + 1} of {world}"
        with (
            progress_bar(sum(map(len, mine)), title=title) as bar,
            Behind(waiting=WAITING_CHUNKS) as behind,
            # Closed by name: the threads must have ended before an error leaves this function.
            closing(ahead(_prepared(work, mine))) as prepared,
        ):
            for chunk in prepared:
                entries, not_finite = encode_chunk(chunk, encoder)
                behind.put(partial(_store, work.backend, entries))
                failed += [*chunk.failed, *not_finite]
                numbers += [number for number, _ in entries]
                bar.update(chunk.size)
    return Built(numbers, work.backend.share(), failed)


def _store(backend: LatentBackend, entries: Sequence[tuple[int, LatentEntry]]) -> None:
    for number, entry in entries:
        backend.put(number, entry)


@dataclass(frozen=True)
class Chunk:
    """Images of one bucket that are ready for the encoder.

    `images` and `numbers` of those that could be decoded, in the order of `pixels_B3HW` (float32, [-1, 1]; None when
    there are none); noise for the posterior of the image and of its mirror image, where that is wanted.
    """

    size: int
    numbers: list[int]
    images: list[PlacedImage]
    failed: list[Skipped]
    pixels_B3HW: Tensor | None = None
    noise_B4hw: Tensor | None = None
    flipped_noise_B4hw: Tensor | None = None


def _prepared(work: _Pass, chunks: Sequence[Sequence[int]]) -> Generator[Chunk, None, None]:
    """Every chunk, decoded and converted.

    Bound of memory: as many whole pictures as there are helpers, and crops of twice as many pictures and one chunk.
    """
    helpers = num_helpers()
    with ThreadPoolExecutor(helpers) as pool:
        waiting: deque[list[Future]] = deque()
        submitted = waiting_images = 0
        try:
            for chunk in chunks:
                while submitted < len(chunks) and (not waiting or waiting_images < 2 * helpers):
                    waiting.append([pool.submit(_decode, work.image(number)) for number in chunks[submitted]])
                    waiting_images += len(chunks[submitted])
                    submitted += 1
                decoded = [future.result() for future in waiting.popleft()]
                waiting_images -= len(chunk)
                yield _ready(work, chunk, decoded)
        finally:
            pool.shutdown(cancel_futures=True)


def _ready(work: _Pass, chunk: Sequence[int], decoded: Sequence[np.ndarray | Skipped]) -> Chunk:
    failed = [pixels for pixels in decoded if isinstance(pixels, Skipped)]
    good = [(n, to_pixels(pixels)) for n, pixels in zip(chunk, decoded, strict=True) if not isinstance(pixels, Skipped)]
    numbers = [number for number, _ in good]
    images = [work.image(number) for number in numbers]
    if not good:
        return Chunk(len(chunk), numbers, images, failed)
    return Chunk(
        len(chunk),
        numbers,
        images,
        failed,
        torch.stack([pixels_3HW for _, pixels_3HW in good]),
        posterior_noise(images, "plain"),
        posterior_noise(images, "flipped") if work.needs_flip[numbers[0]] else None,
    )


def _decode(image: PlacedImage) -> np.ndarray | Skipped:
    record = image.record
    try:
        crop = crop_info(record.size, image.placement, flipped=False)
        picture = read_record(record, image.placement)
        return apply_crop(picture, crop, interpolation=record.subset.resize_interpolation)
    except READ_ERRORS as error:
        return Skipped.because_of(record.path, error)


def encode_chunk(chunk: Chunk, encoder: LatentEncoder) -> tuple[list[tuple[int, LatentEntry]], list[Skipped]]:
    """The entries of a chunk with their numbers, and the images that have no finite latents."""
    if chunk.pixels_B3HW is None or chunk.noise_B4hw is None:
        return [], []
    latents_B4hw, finite_B = encoder(chunk.pixels_B3HW, chunk.noise_B4hw)
    flipped_B4hw = None
    if chunk.flipped_noise_B4hw is not None:
        flipped_B4hw, also_finite_B = encoder(chunk.pixels_B3HW.flip(-1), chunk.flipped_noise_B4hw)
        finite_B = finite_B & also_finite_B
    entries, failed = [], []
    for position, (number, image) in enumerate(zip(chunk.numbers, chunk.images, strict=True)):
        if not finite_B[position]:
            failed.append(Skipped(image.record.path, "the VAE gives no finite latents, in float32 neither"))
            continue
        entry = LatentEntry(
            latents_4hw=latents_B4hw[position].float().cpu().clone(),
            flipped_4hw=None if flipped_B4hw is None else flipped_B4hw[position].float().cpu().clone(),
            original=image.record.size,
            crop_ltrb=legacy_crop_ltrb(image.placement.bucket, image.record.size),
        )
        entries.append((number, entry))
    return entries, failed


def posterior_noise(images: Sequence[PlacedImage], purpose: str) -> Tensor:
    """Standard normal noise (B, 4, h, w) that depends on each record's key and on nothing else."""
    bucket = images[0].placement.bucket
    rows = []
    for image in images:
        generator = torch.Generator().manual_seed(derive_seed("latent", purpose, image.record.key))
        rows.append(torch.randn(4, bucket.h // CELL, bucket.w // CELL, generator=generator))
    return torch.stack(rows)
