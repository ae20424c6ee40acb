"""Encodes every distinct caption once and keeps the result, in memory or as sd-scripts' npz files beside the images.

What is encoded is the caption with its prefix and suffix, the same on each visit. The encoding of the empty caption
is always at hand, so that caption dropout works.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

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
from library.data.captions import fixed_caption, has_one_wording
from library.data.progress import progress_bar
from library.data.stores import TextStore
from library.data.types import PlacedImage
from library.diffusion.conditioning import TextCond
from library.io import fingerprint, text_cache
from library.io.latent_cache import CacheCheck
from library.io.text_cache import TextEntry

TextEncoder = Callable[[list[str]], TextCond]
"""Captions -> their encodings, one row each, on the CPU."""


@dataclass(frozen=True)
class TextCacheOptions:
    """How to cache: `batch_size` captions per call; `width_1` is the first encoder's share of the text width.

    The rest says what an entry depends on besides its caption; `skip_check` trusts old files.
    """

    text_encoder_id: str
    width_1: int
    max_token_length: int = 75
    weighted: bool = False
    to_disk: bool = False
    batch_size: int = 8
    skip_check: bool = False


def build_text(
    images: Sequence[PlacedImage],
    encode: TextEncoder,
    *,
    options: TextCacheOptions,
    rank: int = 0,
    world: int = 1,
) -> tuple[TextStore, CacheReport]:
    """Make the encoded captions of `images` available to every rank and say what had to be done.

    The report counts entries (one per image, as a rule), whatever the number of distinct captions. Every subset
    must have one wording.
    """
    assert all(has_one_wording(image.record.subset) for image in images), "a cached caption has one wording"
    targets = make_targets(
        images, standard_path=lambda image: text_cache.text_cache_path(image.record.path), identity=cached_caption
    )
    index = CacheIndex()
    checks = [CacheCheck("missing")] * len(targets)
    if options.to_disk:
        index.load({target.path.parent for target in targets})
        checks = inspect_all(
            targets, lambda target: _inspect(target, options, index), rank=rank, world=world, title="checking captions"
        )
    store = TextStore(empty=encode([""]).to("cpu", torch.float32))
    report = CacheReport(stale=stale_entries(targets, checks))
    for target, check in zip(targets, checks, strict=True):
        if usable(check):
            report.reused += 1
            _put(store, target, target.path)
    waiting: dict[str, list[Target]] = {}
    for target, check in zip(targets, checks, strict=True):
        if not usable(check):
            waiting.setdefault(cached_caption(target.images[0]), []).append(target)
    for rows in exchange(_build(waiting, encode, options=options, rank=rank, world=world)):
        for caption, row in rows.items():
            for target in waiting[caption]:
                _put(store, target, target.path if row is None else row)
    report.built = sum(map(len, waiting.values()))
    if rank == 0 and options.to_disk and not options.skip_check:
        for target, check in zip(targets, checks, strict=True):
            if check.status != "foreign":
                index.add(target.path, _fingerprint(cached_caption(target.images[0]), options))
        index.save()
    return store, report


def cached_caption(image: PlacedImage) -> str:
    """The caption that is encoded for an image."""
    return fixed_caption(image.record.caption, image.record.subset)


def _put(store: TextStore, target: Target, entry: TextCond | Path) -> None:
    for image in target.images:
        store.put(image.record.key, entry)


def _inspect(target: Target, options: TextCacheOptions, index: CacheIndex) -> CacheCheck:
    if options.skip_check:
        return CacheCheck("valid" if target.path.exists() else "missing")
    expected = _fingerprint(cached_caption(target.images[0]), options)
    if index.confirms(target.path, expected):
        return CacheCheck("valid")
    return text_cache.inspect(target.path, expected, num_tokens=options.max_token_length + 2)


def _fingerprint(caption: str, options: TextCacheOptions) -> str:
    return fingerprint.text_fingerprint(
        caption=caption,
        text_encoder_id=options.text_encoder_id,
        max_token_length=options.max_token_length,
        weighted=options.weighted,
    )


def _build(
    waiting: dict[str, list[Target]], encode: TextEncoder, *, options: TextCacheOptions, rank: int, world: int
) -> dict[str, TextCond | None]:
    """Encode this rank's captions: the row of each, or None where it went into files."""
    rows: dict[str, TextCond | None] = {}
    mine = chunked(list(waiting), options.batch_size)[rank::world]
    if not mine:
        return rows
    with progress_bar(sum(map(len, mine)), title="caching captions", unit="caption") as bar:
        for captions in mine:
            encoded = encode(list(captions)).to("cpu")
            for number, caption in enumerate(captions):
                row = encoded[number : number + 1]
                if options.to_disk:
                    _write(row, waiting[caption], caption, options=options)
                    rows[caption] = None
                else:
                    rows[caption] = TextCond(row.hidden_BTD.float().clone(), row.pooled_BP.float().clone())
            bar.update(len(captions))
    return rows


def _write(row: TextCond, targets: Sequence[Target], caption: str, *, options: TextCacheOptions) -> None:
    hidden = row.hidden_BTD[0]
    entry = TextEntry(hidden[:, : options.width_1], hidden[:, options.width_1 :], row.pooled_BP[0])
    for target in targets:
        text_cache.write(target.path, entry, _fingerprint(caption, options))
