"""Encodes every image once and keeps the latents, in memory or as sd-scripts' npz files beside the images."""

from __future__ import annotations

import secrets
from collections import defaultdict, deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from library.data.background import Behind, ahead, num_helpers
from library.data.cache_places import BESIDE_THE_IMAGES, CachePlace
from library.data.caching import CacheReport, Targets, chunked, exchange, group_targets, stale_entries, usable
from library.data.latent_backends import CELL, LatentBackend, MemoryLatents, NpzLatents
from library.data.packed_latents import PackedLatents
from library.data.pixels import to_mask, to_pixels
from library.data.progress import progress_bar
from library.data.records import READ_ERRORS, PlacedImage, Skipped
from library.data.stores import LatentStore
from library.data.table import ImageTable, text_id
from library.data.transforms import Pictures, cut_plain, read_pictures
from library.diffusion.crops import legacy_crop_ltrb
from library.diffusion.posterior import sample_posterior
from library.io.latent_cache import LatentEntry
from library.seeds import derive_seed

WAITING_CHUNKS = 4
"""Encoded batches that wait to be stored, at most; the encoder waits when the disk is that far behind."""

LatentEncoder = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(pixels_B3HW in [-1, 1], posterior noise_B4hw), both float32 on the CPU -> (unscaled latents_B4hw, finite_B bool).

In a pass that keeps moments, moments_B8hw take the place of the latents, and the noise is not used.
"""


@dataclass(frozen=True)
class LatentCacheOptions:
    """How to cache: `batch_size` images per VAE call; `vae_id` names the weights; `skip_check` trusts what old
    files were made from.

    `place` is where entries on disk lie. With `moments` the posterior's mean and log-variance are kept with the
    latents.
    """

    vae_id: str
    to_disk: bool = False
    batch_size: int = 1
    skip_check: bool = False
    place: CachePlace = BESIDE_THE_IMAGES
    moments: bool = False


class Built(NamedTuple):
    """What a rank brought about: entries by number, made or found to have been made by another run meanwhile; what
    the others need to read them; and failures."""

    numbers: list[int]
    found: list[int]
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
    is written as soon as its batch is done, so an interrupted pass goes on where it stopped. No subset may give
    an image several looks.
    """
    assert not any(subset.has_many_looks for subset in table.subsets), "a cached image has one look"
    work = LatentPass(table, options)
    checks = work.backend.look(rank=rank, world=world)
    missing = [number for number, check in enumerate(checks) if not usable(check)]
    work.backend.prepare(missing)
    parts = exchange(build_entries(work, missing, encode, rank=rank, world=world))
    report = CacheReport(stale=stale_entries(work.backend.place, checks))
    reused = [number for number, check in enumerate(checks) if usable(check)]
    reused += [number for part in parts for number in part.found]
    built = sorted(number for part in parts for number in part.numbers)
    report.built, report.reused = len(built), len(reused)
    report.failed = [failure for part in parts for failure in part.failed]
    entries = work.backend.entries([part.shared for part in parts], right=[*reused, *built], rank=rank)
    return LatentStore(work.targets, entries, has_mask=work.has_mask, moments=options.moments), report


class LatentPass:
    """What a pass works on: the distinct entries, which of them need the mirror image, and where they are kept."""

    def __init__(self, table: ImageTable, options: LatentCacheOptions) -> None:
        self.table = table
        self.options = options
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
            "moments": options.moments,
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


def _chunks(work: LatentPass, missing: Sequence[int]) -> list[Sequence[int]]:
    """Numbers of the entries to encode, in batches of one bucket, smallest buckets first."""
    groups: defaultdict[tuple, list[int]] = defaultdict(list)
    for number in missing:
        bucket = work.table.placement(int(work.targets.first[number])).bucket
        groups[bucket.area, bucket, bool(work.needs_flip[number])].append(number)
    return [chunk for key in sorted(groups) for chunk in chunked(groups[key], work.options.batch_size)]


def _scattered(work: LatentPass, chunks: Sequence[Sequence[int]]) -> list[Sequence[int]]:
    """The chunks of each bucket from a random one on.

    Two runs that build one cache at the same time must not go through it side by side: what one of them has made, the
    other only finds when it comes there later.
    """
    scattered: list[Sequence[int]] = []
    for _, group in groupby(chunks, key=lambda chunk: work.table.placement(int(work.targets.first[chunk[0]])).bucket):
        alike = list(group)
        offset = secrets.randbelow(len(alike))
        scattered += [*alike[offset:], *alike[:offset]]
    return scattered


def build_entries(
    work: LatentPass,
    missing: Sequence[int],
    encode: Callable[[], LatentEncoder],
    *,
    rank: int,
    world: int,
) -> Built:
    """Encode this rank's share of the entries: images are decoded ahead of the encoder, entries stored behind it.

    `missing` are the numbers of the entries that all ranks together have to make.
    """
    numbers: list[int] = []
    found: list[int] = []
    failed: list[Skipped] = []
    mine = _scattered(work, _chunks(work, missing)[rank::world])
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
                entries, not_finite = encode_chunk(chunk, encoder, moments=work.options.moments)
                behind.put(partial(store, work.backend, entries))
                found += chunk.found
                failed += [*chunk.failed, *not_finite]
                numbers += [number for number, _ in entries]
                bar.update(chunk.size)
    return Built(numbers, found, work.backend.share(), failed)


def store(backend: LatentBackend, entries: Sequence[tuple[int, LatentEntry]]) -> None:
    """Keep numbered entries."""
    for number, entry in entries:
        backend.put(number, entry)


@dataclass(frozen=True)
class Chunk:
    """Images of one bucket that are ready for the encoder.

    `images` and `numbers` of those that could be decoded, in the order of `pixels_B3HW` (float32, [-1, 1]; None when
    there are none); noise for the posterior of the image and of its mirror image, where that is wanted; `masks` by
    number, as `LatentEntry` has them. `found` are the numbers of entries that another run has made since the pass
    began.
    """

    size: int
    numbers: list[int]
    images: list[PlacedImage]
    failed: list[Skipped]
    found: Sequence[int] = ()
    pixels_B3HW: Tensor | None = None
    noise_B4hw: Tensor | None = None
    flipped_noise_B4hw: Tensor | None = None
    masks: Mapping[int, Tensor] = field(default_factory=dict)


def _prepared(work: LatentPass, chunks: Sequence[Sequence[int]]) -> Generator[Chunk, None, None]:
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
                    waiting.append([pool.submit(_decode_unless_there, work, n) for n in chunks[submitted]])
                    waiting_images += len(chunks[submitted])
                    submitted += 1
                decoded = [future.result() for future in waiting.popleft()]
                waiting_images -= len(chunk)
                yield _ready(work, chunk, decoded)
        finally:
            pool.shutdown(cancel_futures=True)


def _ready(work: LatentPass, numbers: Sequence[int], decoded: Sequence[Pictures | Skipped | None]) -> Chunk:
    results = list(zip(numbers, decoded, strict=True))
    failed = [result for _, result in results if isinstance(result, Skipped)]
    found = [number for number, result in results if result is None]
    good = {number: result for number, result in results if isinstance(result, Pictures)}
    masks = {number: to_mask(pictures.mask) for number, pictures in good.items() if pictures.mask is not None}
    pixels = {number: to_pixels(pictures.image) for number, pictures in good.items()}
    return make_chunk(work, pixels, masks=masks, failed=failed, found=found)


def make_chunk(
    work: LatentPass,
    pixels_3HW: Mapping[int, Tensor],
    *,
    masks: Mapping[int, Tensor],
    failed: Sequence[Skipped] = (),
    found: Sequence[int] = (),
) -> Chunk:
    """The chunk of the entries whose plain images are given, all of one bucket and alike in `flip_aug`."""
    numbers = list(pixels_3HW)
    images = [work.image(number) for number in numbers]
    size = len(numbers) + len(failed) + len(found)
    if not numbers:
        return Chunk(size, numbers, images, list(failed), found)
    return Chunk(
        size,
        numbers,
        images,
        list(failed),
        found,
        torch.stack(list(pixels_3HW.values())),
        posterior_noise(images, "plain"),
        posterior_noise(images, "flipped") if work.needs_flip[numbers[0]] else None,
        masks,
    )


def _decode_unless_there(work: LatentPass, number: int) -> Pictures | Skipped | None:
    """The cropped image and mask; None when another run has made the entry by now."""
    if usable(work.backend.look_again(number)):
        return None
    return _decode(work.image(number))


def _decode(image: PlacedImage) -> Pictures | Skipped:
    record, placement = image.record, image.placement
    try:
        return cut_plain(read_pictures(record, placement.resized, with_control=False), record, placement)
    except READ_ERRORS as error:
        return Skipped.because_of(record.path, error)


def encode_chunk(
    chunk: Chunk, encoder: LatentEncoder, *, moments: bool = False
) -> tuple[list[tuple[int, LatentEntry]], list[Skipped]]:
    """The entries of a chunk with their numbers, and the images that have no finite latents."""
    if chunk.pixels_B3HW is None or chunk.noise_B4hw is None:
        return [], []
    plain, finite_B = _encode(encoder, chunk.pixels_B3HW, chunk.noise_B4hw, moments=moments)
    mirrored = _Encoded()
    if chunk.flipped_noise_B4hw is not None:
        flipped_B3HW = chunk.pixels_B3HW.flip(-1)
        mirrored, also_finite_B = _encode(encoder, flipped_B3HW, chunk.flipped_noise_B4hw, moments=moments)
        finite_B = finite_B & also_finite_B
    entries, failed = [], []
    for position, (number, image) in enumerate(zip(chunk.numbers, chunk.images, strict=True)):
        if not finite_B[position]:
            failed.append(Skipped(image.record.path, "the VAE gives no finite latents, in float32 neither"))
            continue
        latents_4hw = plain.row("latents_B4hw", position)
        assert latents_4hw is not None
        entry = LatentEntry(
            latents_4hw=latents_4hw,
            flipped_4hw=mirrored.row("latents_B4hw", position),
            original=image.record.size,
            crop_ltrb=legacy_crop_ltrb(image.placement.bucket, image.record.size),
            mask_HW=chunk.masks.get(number),
            moments_8hw=plain.row("moments_B8hw", position),
            flipped_moments_8hw=mirrored.row("moments_B8hw", position),
        )
        entries.append((number, entry))
    return entries, failed


class _Encoded(NamedTuple):
    latents_B4hw: Tensor | None = None
    moments_B8hw: Tensor | None = None

    def row(self, name: str, position: int) -> Tensor | None:
        """A copy of one row, float32 on the CPU."""
        rows = getattr(self, name)
        return None if rows is None else rows[position].float().cpu().clone()


def _encode(
    encoder: LatentEncoder, pixels_B3HW: Tensor, noise_B4hw: Tensor, *, moments: bool
) -> tuple[_Encoded, Tensor]:
    encoded, finite_B = encoder(pixels_B3HW, noise_B4hw)
    if moments:
        return _Encoded(sample_posterior(encoded, noise_B4hw), encoded), finite_B
    return _Encoded(encoded), finite_B


def posterior_noise(images: Sequence[PlacedImage], purpose: str) -> Tensor:
    """Standard normal noise (B, 4, h, w) that depends on each record's key and on nothing else."""
    bucket = images[0].placement.bucket
    rows = []
    for image in images:
        generator = torch.Generator().manual_seed(derive_seed("latent", purpose, image.record.key))
        rows.append(torch.randn(4, bucket.h // CELL, bucket.w // CELL, generator=generator))
    return torch.stack(rows)
