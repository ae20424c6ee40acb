"""Fills the cache of latents while training runs: an image is encoded when it is first met, just as a pass would.

An image that is met at one of several resolutions is encoded at all of them. Held-out images, which no epoch of
training meets, are encoded before the first. So one whole epoch leaves the cache complete; a run that is resumed within
its first, or whose latents lie in memory, may need a part of the next.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from library.data.background import Behind
from library.data.caching import chunked, exchange, stale_entries, usable
from library.data.latent_caching import (
    WAITING_CHUNKS,
    LatentCacheOptions,
    LatentEncoder,
    LatentPass,
    build_entries,
    encode_chunk,
    make_chunk,
    store,
)
from library.data.pixels import to_mask, to_pixels
from library.data.records import Skipped
from library.data.stores import LatentStore
from library.data.table import ImageTable
from library.data.types import Batch, Beside
from library.io.latent_cache import LatentEntry
from library.log import get_logger

log = get_logger(__name__)

REMEMBERED = 256
"""Entries that are kept at hand within an epoch for later repeats of an image; the others are encoded once more."""


class LatentFiller:
    """Encodes what a batch awaits and keeps it; entries are equal to those of `build_latents`.

    `table` is the whole one; the images in it that are held out are encoded at once. `encode` is called once, and only
    when something is missing; `done` when nothing is any more. Every rank fills in what it meets; after each epoch the
    ranks tell each other (`end_epoch`). An image without finite latents costs its samples, as without a cache.
    `is_complete`: whether the ranks found at their last meeting that nothing is missing.
    """

    def __init__(
        self,
        table: ImageTable,
        encode: Callable[[], LatentEncoder],
        *,
        options: LatentCacheOptions,
        done: Callable[[], None],
        rank: int = 0,
        world: int = 1,
    ) -> None:
        assert not any(subset.has_many_looks for subset in table.subsets), "a cached image has one look"
        self._work, self._encode, self._done = LatentPass(table, options), encode, done
        self._rank, self._world = rank, world
        checks = self._work.backend.look(rank=rank, world=world)
        self._right = {number for number, check in enumerate(checks) if usable(check)}
        self._work.backend.prepare(sorted(set(range(len(checks))) - self._right))
        self._made: dict[int, LatentEntry] = {}
        self._built: set[int] = set()
        self.is_complete = False
        self._failed: dict[int, Skipped] = {}
        stale = stale_entries(self._work.backend.place, checks)
        held_out = self._missing_of_held_out()
        log.info(
            f"latents: {len(self._right)} cached, {self._missing() - len(held_out)} to be cached when met, "
            f"{len(held_out)} of held-out images to be cached now, {len(stale)} stale"
        )
        self._encoder = encode() if self._missing() else None
        self._encode_now(held_out)
        self._behind = Behind(waiting=WAITING_CHUNKS)
        self._behind.__enter__()

    def store(self) -> LatentStore:
        """What is there by now; a collective call."""
        parts = exchange((self._built, self._failed, self._work.backend.share()))
        for built, failed, _ in parts:
            self._right |= built
            self._failed |= failed
        shared = [part for _, _, part in parts]
        entries = self._work.backend.entries(shared, right=sorted(self._right), rank=self._rank)
        moments = self._work.options.moments
        self.is_complete = not self._missing()
        return LatentStore(
            self._work.targets,
            entries,
            has_mask=self._work.has_mask,
            moments=moments,
            is_filling=not self.is_complete,
        )

    def fill(self, batch: Batch) -> Batch:
        """The batch with latents, or moments, in place of the pixels it came with."""
        self._note_failures(batch.failures)
        if batch.awaits:
            batch = self._with_latents(batch)
        if batch.beside:
            self._encode_beside(batch.beside)
            batch = replace(batch, beside=())
        return batch

    def _with_latents(self, batch: Batch) -> Batch:
        waiting = [position for position, awaited in enumerate(batch.awaits) if awaited is not None]
        assert batch.pixels_B3HW is not None
        found = self._entries(batch, waiting)
        name, cells = ("moments_B8hw", 8) if self._work.options.moments else ("latents_B4hw", 4)
        shape = (len(batch), cells, batch.bucket.h // 8, batch.bucket.w // 8)
        rows = getattr(batch, name)
        rows = torch.zeros(shape) if rows is None else rows.clone()
        for position in waiting:
            awaited = batch.awaits[position]
            assert awaited is not None
            entry = found.get(self._number(awaited.row))
            rows[position] = torch.nan if entry is None else self._wanted(entry, flipped=awaited.flipped)
        return replace(batch, pixels_B3HW=None, awaits=(), **{name: rows})

    def end_epoch(self) -> LatentStore:
        """Bring the ranks together after an epoch; the store for the next one. A collective call."""
        self._behind.wait()
        fresh = self.store()
        self._made.clear()
        if self.is_complete:
            self._encoder = None
            self._done()
            log.info(f"latents: the cache is complete, {len(self._right)} entries, {len(self._failed)} failed")
            for failure in self._failed.values():
                log.warning(f"latents: failed: {failure.path}: {failure.reason}")
        return fresh

    @property
    def failures(self) -> list[Skipped]:
        """The images that could not be cached, as far as this rank knows: all of them after `end_epoch`."""
        return list(dict.fromkeys(self._failed[number] for number in sorted(self._failed)))

    def close(self) -> None:
        """Store what is still to be stored; raises what storing has raised, unless an error is on its way already."""
        self._behind.__exit__(*sys.exc_info())

    def _missing_of_held_out(self) -> list[int]:
        table = self._work.table
        is_held_out = table.is_validation[table.image_of[self._work.targets.first]]
        return sorted(set(np.flatnonzero(is_held_out).tolist()) - self._right)

    def _encode_now(self, numbers: Sequence[int]) -> None:
        """Encode entries of all ranks together, each its share."""
        encoder = self._encoder
        if not numbers or encoder is None:
            return
        built = build_entries(self._work, numbers, lambda: encoder, rank=self._rank, world=self._world)
        self._built |= {*built.numbers, *built.found}
        self._note_failures(built.failed)

    def _encode_beside(self, beside: Sequence[Beside]) -> None:
        """Encode images at resolutions other than those of their batch."""
        known = self._right | self._built | self._failed.keys()
        new = {number: one for one in beside if (number := self._number(one.row)) not in known}
        pixels = {number: to_pixels(one.pixels) for number, one in new.items()}
        self._make_all(pixels, {number: to_mask(one.mask) for number, one in new.items() if one.mask is not None})

    def _note_failures(self, failures: Sequence[Skipped]) -> None:
        """Images that cannot be read have no entry to wait for."""
        table, targets = self._work.table, self._work.targets
        for failure in failures:
            of_this_image = np.isin(table.image_of[targets.first], table.images_at(failure.path))
            for number in set(np.flatnonzero(of_this_image).tolist()) - self._right - self._built:
                self._failed[number] = failure

    def _number(self, row: int) -> int:
        return int(self._work.targets.number_of[row])

    def _missing(self) -> int:
        return len(self._work.targets) - len(self._right | self._failed.keys())

    def _wanted(self, entry: LatentEntry, *, flipped: bool) -> torch.Tensor:
        if self._work.options.moments:
            rows = entry.flipped_moments_8hw if flipped else entry.moments_8hw
        else:
            rows = entry.flipped_4hw if flipped else entry.latents_4hw
        assert rows is not None
        return rows

    def _entries(self, batch: Batch, waiting: list[int]) -> dict[int, LatentEntry]:
        """The entries that a batch awaits, by number; those that fail are left out."""
        assert batch.pixels_B3HW is not None
        pixels, masks = {}, {}
        for position, pixels_3HW in zip(waiting, batch.pixels_B3HW, strict=True):
            awaited = batch.awaits[position]
            assert awaited is not None
            number = self._number(awaited.row)
            pixels[number] = pixels_3HW
            if self._work.has_mask[number]:
                assert batch.mask_B1hw is not None
                mask_hw = batch.mask_B1hw[position, 0]
                masks[number] = mask_hw.flip(-1) if awaited.flipped else mask_hw
        # An image met before in this epoch is still waited for by batches that were built ahead.
        found = {number: self._made[number] for number in pixels if number in self._made}
        todo = [number for number in pixels if number not in found and number not in self._failed]
        return found | self._make_all({number: pixels[number] for number in todo}, masks)

    def _make_all(self, pixels_3HW: dict[int, torch.Tensor], masks: dict[int, torch.Tensor]) -> dict[int, LatentEntry]:
        """Entries by number, of images of any size; those that fail are left out."""
        groups: defaultdict[tuple, list[int]] = defaultdict(list)
        for number, pixels in pixels_3HW.items():
            groups[pixels.shape, bool(self._work.needs_flip[number])].append(number)
        made: dict[int, LatentEntry] = {}
        for group in groups.values():
            for alike in chunked(group, self._work.options.batch_size):
                made |= self._make({number: pixels_3HW[number] for number in alike}, masks)
        return made

    def _make(self, pixels_3HW: dict[int, torch.Tensor], masks: dict[int, torch.Tensor]) -> dict[int, LatentEntry]:
        if self._encoder is None:
            self._encoder = self._encode()
        chunk = make_chunk(self._work, pixels_3HW, masks=masks)
        entries, failed = encode_chunk(chunk, self._encoder, moments=self._work.options.moments)
        made = {number: self._work.backend.as_kept(entry) for number, entry in entries}
        new = [(number, entry) for number, entry in entries if number not in self._built]
        self._behind.put(partial(store, self._work.backend, new))
        self._made |= made
        while len(self._made) > REMEMBERED:
            del self._made[next(iter(self._made))]
        self._built |= made.keys()
        by_path = {failure.path: failure for failure in failed}
        for number, image in zip(chunk.numbers, chunk.images, strict=True):
            if number not in made:
                self._failed[number] = by_path[image.record.path]
        return made
