"""Latents in a packed cache during a pass: the store `latents` of the cache folder, and beside it `stamps`.

All entries are looked up and compared at once, with numpy. `stamps` notes files that have another time than an entry
was made from and were found to be the same, so that a copied data set is read once and not at every start.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from library.data.cache_places import require_writable
from library.data.caching import Targets, agreed, inspect_all
from library.data.packed_entries import (
    FACTS,
    PackedLatentEntries,
    arrays_of,
    entry_of,
    facts_of,
    latent_ids,
    recipe,
    stamp_of,
    vae_of,
)
from library.data.records import PlacedImage
from library.data.table import ImageTable
from library.errors import UserError
from library.io import fingerprint
from library.io.fingerprint import ImageStamp
from library.io.latent_cache import CELL, CacheCheck, LatentEntry
from library.io.packed_record import Layout
from library.io.packed_store import PackedStore
from library.io.packed_writer import PackedWriter
from library.log import get_logger

log = get_logger(__name__)

_MISSING, _VALID, _FOREIGN, _STALE, _DOUBT = range(5)
"""What is said of an entry; one in doubt was made from a file of the same length and another time."""

_CHECKS = (CacheCheck("missing"), CacheCheck("valid"), CacheCheck("foreign"))

STAMPS = "stamps"


class PackedLatents:
    """Keeps entries in a packed store. `vae_id` names the weights ("": any will do); `skip_check` trusts old ones."""

    def __init__(
        self,
        table: ImageTable,
        targets: Targets,
        *,
        folder: Path,
        needs_flip: np.ndarray,
        has_mask: np.ndarray,
        vae_id: str,
        skip_check: bool = False,
        moments: bool = False,
    ) -> None:
        self._table, self._targets, self._folder = table, targets, folder
        self._needs_flip, self._has_mask, self._vae_id = needs_flip, has_mask, vae_id
        self._skip_check, self._moments = skip_check, moments
        self.ids = latent_ids(table, targets.first)
        self.store = PackedStore.open(folder, facts_dtype=FACTS)
        self._writer = PackedWriter(folder, recipe=recipe(vae_id), facts_dtype=FACTS)
        self._stamps_folder = folder.with_name(STAMPS)
        self._same: dict[int, np.ndarray] = {}
        self._refreshing = threading.Lock()

    def look(self, *, rank: int, world: int) -> list[CacheCheck]:
        """Compare all facts at once; files that may only have been touched are read, shared among the ranks."""
        judged = agreed(self._judge(np.arange(len(self.ids))) if rank == 0 else None)
        assert judged is not None
        codes, reasons = judged
        doubts = np.flatnonzero(codes == _DOUBT)
        found = inspect_all(
            len(doubts), lambda index: self._settle(int(doubts[index])), rank=rank, world=world, title="checking images"
        )
        checks = [_CHECKS[code] if code < _STALE else _CHECKS[_MISSING] for code in codes.tolist()]
        for number, why in reasons.items():
            checks[number] = CacheCheck("stale", why)
        for number, check in zip(doubts.tolist(), found, strict=True):
            checks[number] = check
        return checks

    def look_again(self, number: int) -> CacheCheck:
        """What is there of an entry now: another run may have made it."""
        with self._refreshing:
            self.store.refresh()
            codes, reasons = self._judge(np.array([number]))
        if codes[0] == _DOUBT:
            return self._settle(number)
        return CacheCheck("stale", reasons[number]) if codes[0] == _STALE else _CHECKS[codes[0]]

    def place(self, number: int) -> str:
        """The store, and the key of the entry's image."""
        return f"{self._folder}: {self._image(number).record.key}"

    def prepare(self, numbers: Sequence[int]) -> None:
        """Find out whether the folder can be written to."""
        if numbers:
            require_writable([self._folder])

    def put(self, number: int, entry: LatentEntry) -> None:
        """Append it to this process's shard."""
        image = self._image(number)
        self._writer.append(int(self.ids[number]), arrays_of(entry), key=image.record.key, facts=facts_of(image))

    def as_kept(self, entry: LatentEntry) -> LatentEntry:
        """Rounded to the dtype of the store."""
        return entry_of(arrays_of(entry), original=entry.original)

    def share(self) -> None:
        """Flush what was put; the others find the shards by themselves."""
        self._writer.close()

    def entries(self, shared: Sequence[None], *, right: Sequence[int], rank: int) -> PackedLatentEntries:
        """All entries that are right. Raises UserError when a run with another VAE has replaced some meanwhile."""
        if self._same:
            self._note_touched()
        self.store.refresh()
        if rank == 0:
            self.store.save_index()
        numbers = np.array(right, dtype=np.int64)
        positions = np.full(len(self.ids), -1, dtype=np.int64)
        positions[numbers] = self.store.find(self.ids[numbers])
        if not self._skip_check and not self._is_vae_right(positions[numbers]).all():
            raise UserError(
                "another run changed entries of this cache while it was being built",
                str(self._folder),
                "let only one run build a cache at a time, or give a run with another VAE its own --cache_dir",
            )
        return PackedLatentEntries(self.store, positions)

    def _image(self, number: int) -> PlacedImage:
        return self._table[int(self._targets.first[number])]

    def _judge(self, numbers: np.ndarray) -> tuple[np.ndarray, dict[int, tuple[str, ...]]]:
        """The codes of entries (uint8), and of stale ones the reasons by number."""
        codes = np.full(len(numbers), _MISSING, dtype=np.uint8)
        positions = self.store.find(self.ids[numbers])
        found = np.flatnonzero(positions >= 0)
        if not len(found):
            return codes, {}
        there, positions = numbers[found], positions[found]
        misfits = self._misfits(positions, there)
        here = np.full(len(there), _VALID, dtype=np.uint8)
        if not self._skip_check:
            here[self._is_foreign(positions)] = _FOREIGN
            misfits["VAE changed"] = ~self._is_vae_right(positions)
            facts = self.store.facts(positions)
            changed = {
                "image changed": self._compare("", there, facts),
                "mask changed": self._compare("mask_", there, facts),
            }
            misfits |= {why: code == _STALE for why, code in changed.items()}
            doubtful = np.flatnonzero(np.any([code == _DOUBT for code in changed.values()], axis=0))
            here[doubtful[~self._are_noted(there[doubtful], facts[doubtful])]] = _DOUBT
        stale = np.any(list(misfits.values()), axis=0)
        here[stale] = _STALE
        codes[found] = here
        reasons = {
            int(there[index]): tuple(why for why, is_so in misfits.items() if is_so[index])
            for index in np.flatnonzero(stale).tolist()
        }
        return codes, reasons

    def _misfits(self, positions: np.ndarray, there: np.ndarray) -> dict[str, np.ndarray]:
        """What entries lack or have in another shape, bool by reason, for the entries `there`."""
        layouts, which = self.store.layouts(positions)
        placement_of = self._table.placement_of[self._targets.first[there]]
        buckets = np.array([place.bucket for place in self._table.placements], dtype=np.int64)[placement_of] // CELL
        sides = np.array([_sides(layout) for layout in layouts], dtype=np.int64).reshape(-1, 2)[which]
        flipped = np.array(["latents_flipped" in layout.fields for layout in layouts], dtype=bool)[which]
        masks = np.array(["mask" in layout.fields for layout in layouts], dtype=bool)[which]
        return {
            "no latents of the mirrored image": self._needs_flip[there] & ~flipped,
            "bucket changed": (sides != buckets).any(axis=1),
            "no mask": self._has_mask[there] & ~masks,
            "no mean and variance": self._moments & ~self._have_moments(layouts, which, there),
        }

    def _have_moments(self, layouts: Sequence[Layout], which: np.ndarray, there: np.ndarray) -> np.ndarray:
        plain, flipped = (
            np.array([name in layout.fields for layout in layouts], dtype=bool)[which]
            for name in ("moments", "moments_flipped")
        )
        return plain & (flipped | ~self._needs_flip[there])

    def _is_vae_right(self, positions: np.ndarray) -> np.ndarray:
        fits = [self._fits(text) for text in self.store.recipes]
        return np.array(fits, dtype=bool)[self.store.recipe_of(positions)]

    def _fits(self, recipe_text: str) -> bool:
        try:
            vae = vae_of(recipe_text)
        except (ValueError, KeyError, TypeError):
            return False
        return not self._vae_id or vae is None or vae == self._vae_id

    def _is_foreign(self, positions: np.ndarray) -> np.ndarray:
        nobody = np.array([text == recipe(None) for text in self.store.recipes], dtype=bool)
        return nobody[self.store.recipe_of(positions)]

    def _compare(self, prefix: str, there: np.ndarray, facts: np.ndarray) -> np.ndarray:
        """_VALID, _DOUBT or _STALE for each of `there`: the image file ("") or the mask file ("mask_")."""
        sizes, times = self._stamps(prefix, there)
        code = np.full(len(there), _VALID, dtype=np.uint8)
        code[times != facts[f"{prefix}mtime_ns"]] = _DOUBT
        code[sizes != facts[f"{prefix}bytes"]] = _STALE
        return code

    def _stamps(self, prefix: str, there: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Bytes and times of the files as they are: from the scan where it looked, else asked now; 0 for no file."""
        images = self._table.image_of[self._targets.first[there]]
        if prefix:
            stamps = np.zeros((len(images), 2), dtype=np.int64)
            texts = self._table.masks
            unknown = np.flatnonzero(texts.has_text(images)).tolist()
        else:
            stamps = self._table.stamps[images]
            texts = self._table.paths
            unknown = np.flatnonzero(stamps[:, 0] < 0).tolist()
        for place in unknown:
            try:
                stat = os.stat(texts.text(int(images[place])))
                stamps[place] = stat.st_size, stat.st_mtime_ns
            except OSError:
                stamps[place] = -1  # encoding the image will fail and say so
        return stamps[:, 0], stamps[:, 1]

    def _are_noted(self, numbers: np.ndarray, facts: np.ndarray) -> np.ndarray:
        """Which of the entries were made from files that were found unchanged with the times that they have now."""
        found = np.zeros(len(numbers), dtype=bool)
        if not len(numbers):
            return found
        notes = PackedStore.open(self._stamps_folder, facts_dtype=FACTS)
        positions = notes.find(self.ids[numbers])
        there = positions >= 0
        noted, facts, numbers = notes.facts(positions[there]), facts[there], numbers[there]
        same = np.ones(len(noted), dtype=bool)
        for prefix in ("", "mask_"):
            sizes, times = self._stamps(prefix, numbers)
            same &= (noted[f"{prefix}bytes"] == sizes) & (noted[f"{prefix}mtime_ns"] == times)
            same &= (noted[f"{prefix}hash"] == facts[f"{prefix}hash"]).all(axis=1)
        found[there] = same
        return found

    def _note_touched(self) -> None:
        """Write down which files were found unchanged; a folder that cannot be written to goes without."""
        try:
            with PackedWriter(self._stamps_folder, recipe="", facts_dtype=FACTS) as writer:
                for number, facts in self._same.items():
                    writer.append(int(self.ids[number]), {}, facts=facts)
        except (UserError, OSError) as error:
            log.debug("%s: touched files are not noted (%s)", self._stamps_folder, error)
        self._same.clear()

    def _settle(self, number: int) -> CacheCheck:
        """Judge an entry of touched files by their contents."""
        positions = self.store.find(self.ids[number : number + 1])
        if positions[0] < 0:
            return CacheCheck("missing")  # the first rank has seen it, and since then it was cleaned away
        facts, record = self.store.facts(positions)[0], self._image(number).record
        reasons = []
        for prefix, path, what in (("", record.path, "image"), ("mask_", record.mask, "mask")):
            if path is not None and not _is_same(path, stamp_of(facts, prefix)):
                reasons.append(f"{what} changed")
        if reasons:
            return CacheCheck("stale", tuple(reasons))
        one = np.array([number])
        for prefix in ("", "mask_"):
            sizes, times = self._stamps(prefix, one)
            facts[f"{prefix}bytes"], facts[f"{prefix}mtime_ns"] = sizes[0], times[0]
        self._same[number] = facts
        return CacheCheck("valid")


def _sides(layout: Layout) -> tuple[int, int]:
    """Width and height of the latents; -1 where there are none of the right kind, or unequal ones."""
    shapes = {layout.fields[name].shape for name in ("latents", "latents_flipped") if name in layout.fields}
    if "latents" not in layout.fields or len(shapes) != 1 or len(shape := shapes.pop()) != 3 or shape[0] != 4:
        return -1, -1
    return shape[2], shape[1]


def _is_same(path: str, stamp: ImageStamp) -> bool:
    try:
        return fingerprint.content_hash(path) == stamp.hash
    except OSError:
        return False
