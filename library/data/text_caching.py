"""Encodes every distinct caption once and keeps the result, in memory or as sd-scripts' npz files beside the images.

What is encoded is the caption with its prefix and suffix, the same on each visit. The encoding of the empty caption
is always at hand, so that caption dropout works.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from library.data.caching import CacheReport, Targets, chunked, exchange, group_targets, stale_entries, usable
from library.data.captions import fixed_wording, has_one_wording
from library.data.progress import progress_bar
from library.data.stores import TextStore
from library.data.table import ImageTable, text_id
from library.data.text_backends import MemoryText, NpzText, TextBackend, TextCacheOptions
from library.diffusion.conditioning import TextCond

TextEncoder = Callable[[list[str]], TextCond]
"""Captions -> their encodings, one row each, on the CPU."""


class Built(NamedTuple):
    """What a rank brought about: encoded captions by number, what the others need to read them, and how many."""

    numbers: list[int]
    shared: Any


def build_text(
    table: ImageTable,
    encode: TextEncoder,
    *,
    options: TextCacheOptions,
    rank: int = 0,
    world: int = 1,
) -> tuple[TextStore, CacheReport]:
    """Make the encoded captions of the images in use available to every rank and say what had to be done.

    Equal captions are encoded once. The report counts entries: one per image file on disk, one per distinct caption
    in memory. Every subset must have one wording.
    """
    assert all(has_one_wording(subset) for subset in table.subsets), "a cached caption has one wording"
    captions = _captions(table)
    targets = _targets(table, captions, to_disk=options.to_disk)
    wordings = [captions[image] for image in targets.first.tolist()]
    backend: TextBackend = MemoryText(len(targets))
    if options.to_disk:
        ids = np.fromiter(map(text_id, wordings), np.uint64, len(wordings))
        backend = NpzText(table, targets.first, captions=wordings, caption_ids=ids, options=options)
    checks = backend.look(rank=rank, world=world)
    store_empty = encode([""]).to("cpu", torch.float32)
    waiting: dict[str, list[int]] = {}
    for number, check in enumerate(checks):
        if not usable(check):
            waiting.setdefault(wordings[number], []).append(number)
    parts = exchange(_build(waiting, encode, backend, batch_size=options.batch_size, rank=rank, world=world))
    reused = [number for number, check in enumerate(checks) if usable(check)]
    built = sorted(number for part in parts for number in part.numbers)
    report = CacheReport(stale=stale_entries(backend.place, checks), built=len(built), reused=len(reused))
    entries = backend.entries([part.shared for part in parts], right=[*reused, *built], rank=rank)
    return TextStore(targets, entries, empty=store_empty), report


def _captions(table: ImageTable) -> dict[int, str]:
    """The caption that is encoded for every image in use; equal ones are one object."""
    shared: dict[str, str] = {}
    captions = {}
    wordings = [fixed_wording(subset) for subset in table.subsets]
    images = table.images
    for image, subset in zip(images.tolist(), table.subset_of[images].tolist(), strict=True):
        caption = wordings[subset](table.captions.text(image))
        captions[image] = shared.setdefault(caption, caption)
    return captions


def _targets(table: ImageTable, captions: Mapping[int, str], *, to_disk: bool) -> Targets:
    """One entry per caption, or on disk per image file and caption."""
    images = table.images
    ids = np.fromiter((text_id(captions[image]) for image in images.tolist()), np.uint64, len(images))
    columns = (ids, table.path_ids[images]) if to_disk else (ids,)
    return group_targets(images, columns, total=table.num_images)


def _build(
    waiting: Mapping[str, Sequence[int]],
    encode: TextEncoder,
    backend: TextBackend,
    *,
    batch_size: int,
    rank: int,
    world: int,
) -> Built:
    """Encode this rank's captions."""
    numbers: list[int] = []
    mine = chunked(list(waiting), batch_size)[rank::world]
    if mine:
        with progress_bar(sum(map(len, mine)), title="caching captions", unit="caption") as bar:
            for captions in mine:
                encoded = encode(list(captions)).to("cpu")
                for position, caption in enumerate(captions):
                    for number in waiting[caption]:
                        backend.put(number, encoded[position : position + 1])
                        numbers.append(number)
                bar.update(len(captions))
    return Built(numbers, backend.share())
