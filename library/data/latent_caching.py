"""Encodes every image once and keeps the latents, in memory or as sd-scripts' npz files beside the images."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from library.data.cache_index import CacheIndex
from library.data.caching import (
    CacheReport,
    Target,
    chunked,
    exchange,
    inspect_all,
    make_targets,
    stale_entries,
    usable,
)
from library.data.progress import progress_bar
from library.data.stores import LatentStore
from library.data.transforms import apply_crop, crop_info, read_record, to_pixels
from library.data.types import READ_ERRORS, PlacedImage, Skipped
from library.diffusion.conditioning import legacy_crop_ltrb
from library.io import fingerprint, latent_cache
from library.io.latent_cache import CacheCheck, LatentEntry
from library.seeds import derive_seed

DECODERS = 4
"""Threads that decode images while the VAE works; decoding releases Python's lock."""

CELL = 8
"""Pixels per latent cell along one side."""

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
    """What a rank brought about: memory entries by target index, files written, and failures."""

    entries: dict[int, LatentEntry]
    written: set[int]
    failed: list[Skipped]


def build_latents(
    images: Sequence[PlacedImage],
    encode: Callable[[], LatentEncoder],
    *,
    options: LatentCacheOptions,
    rank: int = 0,
    world: int = 1,
) -> tuple[LatentStore, CacheReport]:
    """Make the latents of `images` available to every rank and say what had to be done.

    `encode` is called once, and only when something must be encoded. Latents are a sample of the VAE's posterior
    whose noise is derived from the record's key, so they depend neither on batch nor on rank. An image that cannot be
    decoded or has no finite latents is in the report's `failed` and absent from the store. With `to_disk` each file is
    written as soon as its batch is done, so an interrupted pass goes on where it stopped. No subset may crop at
    random.
    """
    assert not any(image.record.subset.random_crop for image in images), "a cached image has one crop"
    targets = make_targets(images, standard_path=_path, identity=_identity)
    index = CacheIndex()
    checks = [CacheCheck("missing")] * len(targets)
    if options.to_disk:
        index.load({target.path.parent for target in targets})
        checks = inspect_all(
            targets, lambda target: _inspect(target, options, index), rank=rank, world=world, title="checking latents"
        )
    chunks = _chunks(targets, checks, options.batch_size)
    parts = exchange(_build(targets, chunks, encode, options=options, rank=rank, world=world))
    if rank == 0 and not options.skip_check:
        right = [i for i, check in enumerate(checks) if check.status == "valid"]
        for target in (targets[i] for i in (*right, *(i for part in parts for i in part.written))):
            if (expected := _expected(target, options)) is not None:
                index.add(target.path, expected, contents=_contents(target))
        index.save()
    return _collect(targets, checks, parts)


def _collect(
    targets: Sequence[Target], checks: Sequence[CacheCheck], parts: Sequence[Built]
) -> tuple[LatentStore, CacheReport]:
    """Put together what all ranks did."""
    store = LatentStore()
    report = CacheReport(stale=stale_entries(targets, checks))
    for index, check in enumerate(checks):
        if usable(check):
            report.reused += 1
            _put(store, targets[index], targets[index].path)
    for part in parts:
        report.failed += part.failed
        report.built += len(part.written) + len(part.entries)
        for index in sorted(part.written):
            _put(store, targets[index], targets[index].path)
        for index, entry in part.entries.items():
            _put(store, targets[index], entry)
    return store, report


def _put(store: LatentStore, target: Target, entry: LatentEntry | Path) -> None:
    for image in target.images:
        store.put(image.record.key, entry)


def _path(image: PlacedImage) -> Path:
    return latent_cache.latent_cache_path(image.record.path, image.record.size)


def _identity(image: PlacedImage) -> tuple:
    return image.record.path, image.placement.bucket, image.placement.resized, image.record.subset.resize_interpolation


def _needs_flip(target: Target) -> bool:
    return any(image.record.subset.flip_aug for image in target.images)


def _contents(target: Target) -> str:
    return "plain and mirrored" if _needs_flip(target) else "plain"


def _expected(target: Target, options: LatentCacheOptions) -> str | None:
    """The fingerprint that the entry should have; None when the image has gone since the scan."""
    try:
        return _fingerprint(target.images[0], vae_id=options.vae_id, with_hash=False)
    except OSError:
        return None


def _inspect(target: Target, options: LatentCacheOptions, index: CacheIndex) -> CacheCheck:
    if options.skip_check:
        return CacheCheck("valid" if target.path.exists() else "missing")
    expected = _expected(target, options)
    if expected is None:
        # Encoding the image will fail and say so.
        return CacheCheck("missing")
    if index.confirms(target.path, expected, contents=_contents(target)):
        return CacheCheck("valid")
    image = target.images[0]
    bucket = image.placement.bucket
    return latent_cache.inspect(
        target.path,
        expected,
        need_flipped=_needs_flip(target),
        latent_hw=(bucket.h // CELL, bucket.w // CELL),
        image_path=image.record.path,
    )


def _fingerprint(image: PlacedImage, *, vae_id: str, with_hash: bool) -> str:
    crop = crop_info(image.record.size, image.placement, flipped=False)
    return fingerprint.latent_fingerprint(
        image=fingerprint.image_stamp(image.record.path, with_hash=with_hash),
        bucket=crop.target,
        resized=crop.resized,
        crop=(crop.left, crop.top),
        vae_id=vae_id,
        interpolation=image.record.subset.resize_interpolation,
    )


def _chunks(targets: Sequence[Target], checks: Sequence[CacheCheck], batch_size: int) -> list[Sequence[int]]:
    """Indices of the targets to encode, in batches of one bucket, smallest buckets first."""
    groups: defaultdict[tuple, list[int]] = defaultdict(list)
    for index, (target, check) in enumerate(zip(targets, checks, strict=True)):
        if not usable(check):
            bucket = target.images[0].placement.bucket
            groups[bucket.area, bucket, _needs_flip(target)].append(index)
    return [chunk for key in sorted(groups) for chunk in chunked(groups[key], batch_size)]


def _build(
    targets: Sequence[Target],
    chunks: Sequence[Sequence[int]],
    encode: Callable[[], LatentEncoder],
    *,
    options: LatentCacheOptions,
    rank: int,
    world: int,
) -> Built:
    """Encode this rank's chunks, decoding ahead in the background."""
    built = Built({}, set(), [])
    mine = chunks[rank::world]
    if not mine:
        return built
    encoder = encode()
    title = "caching latents" if world == 1 else f"caching latents, process {rank + 1} of {world}"
    with progress_bar(sum(map(len, mine)), title=title) as bar:
        for chunk, decoded in _decoded(targets, mine):
            good = []
            for index, pixels in zip(chunk, decoded, strict=True):
                if isinstance(pixels, Skipped):
                    built.failed.append(pixels)
                else:
                    good.append((index, pixels))
            if good:
                _encode_chunk(targets, good, encoder, options=options, built=built)
            bar.update(len(chunk))
    return built


def _decoded(
    targets: Sequence[Target], chunks: Sequence[Sequence[int]]
) -> Iterator[tuple[Sequence[int], list[np.ndarray | Skipped]]]:
    """Each chunk with its images, cropped, uint8; the next chunk is decoded while this one is worked on."""
    with ThreadPoolExecutor(DECODERS) as pool:
        waiting: list[list[Future]] = []
        for number, chunk in enumerate(chunks):
            for ahead in chunks[number + len(waiting) : number + 2]:
                waiting.append([pool.submit(_decode, targets[index].images[0]) for index in ahead])
            yield chunk, [future.result() for future in waiting.pop(0)]


def _decode(image: PlacedImage) -> np.ndarray | Skipped:
    record = image.record
    try:
        crop = crop_info(record.size, image.placement, flipped=False)
        return apply_crop(read_record(record), crop, interpolation=record.subset.resize_interpolation)
    except READ_ERRORS as error:
        return Skipped.because_of(record.path, error)


def _encode_chunk(
    targets: Sequence[Target],
    good: Sequence[tuple[int, np.ndarray]],
    encoder: LatentEncoder,
    *,
    options: LatentCacheOptions,
    built: Built,
) -> None:
    images = [targets[index].images[0] for index, _ in good]
    pixels_B3HW = torch.stack([to_pixels(pixels) for _, pixels in good])
    latents_B4hw, finite_B = encoder(pixels_B3HW, posterior_noise(images, "plain"))
    flipped_B4hw = None
    if _needs_flip(targets[good[0][0]]):
        flipped_B4hw, also_finite_B = encoder(pixels_B3HW.flip(-1), posterior_noise(images, "flipped"))
        finite_B = finite_B & also_finite_B
    for row, (index, _) in enumerate(good):
        image = images[row]
        if not finite_B[row]:
            built.failed.append(Skipped(image.record.path, "the VAE gives no finite latents, in float32 neither"))
            continue
        entry = LatentEntry(
            latents_4hw=latents_B4hw[row].float().cpu().clone(),
            flipped_4hw=None if flipped_B4hw is None else flipped_B4hw[row].float().cpu().clone(),
            original=image.record.size,
            crop_ltrb=legacy_crop_ltrb(image.placement.bucket, image.record.size),
        )
        if options.to_disk:
            stamp = _fingerprint(image, vae_id=options.vae_id, with_hash=True)
            latent_cache.write(targets[index].path, entry, stamp)
            built.written.add(index)
        else:
            built.entries[index] = entry


def posterior_noise(images: Sequence[PlacedImage], purpose: str) -> Tensor:
    """Standard normal noise (B, 4, h, w) that depends on each record's key and on nothing else."""
    bucket = images[0].placement.bucket
    rows = []
    for image in images:
        generator = torch.Generator().manual_seed(derive_seed("latent", purpose, image.record.key))
        rows.append(torch.randn(4, bucket.h // CELL, bucket.w // CELL, generator=generator))
    return torch.stack(rows)
