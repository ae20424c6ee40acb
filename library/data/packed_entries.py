"""What an entry of a packed cache of latents is: its id, facts, recipe and arrays. See docs/packed_store.md.

An entry is found by what it is of: the image's key, its placement, filter and kind of mask. Whether it still holds is
in its facts (the image and mask files it was made from) and in its shard's recipe (the VAE). So entries of several
resolutions lie side by side, and one made from another picture or by another VAE is replaced. (The VAE is no part of
the id because then nothing could be found, counted or converted without loading one.)
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor

from library.data.latent_backends import mask_source
from library.data.records import PlacedImage
from library.data.stores import small_mask
from library.data.table import ImageTable, text_id
from library.io import fingerprint
from library.io.fingerprint import ImageStamp
from library.io.latent_cache import LatentEntry
from library.io.packed_store import PackedStore
from library.sizes import Size

VERSION = 1
"""Raised when the meaning of an entry changes, so that older ones are built again."""

FACTS = np.dtype(
    [
        ("bytes", "<i8"), ("mtime_ns", "<i8"), ("hash", "u1", (16,)),
        ("mask_bytes", "<i8"), ("mask_mtime_ns", "<i8"), ("mask_hash", "u1", (16,)),
        ("bucket", "<u4", (2,)), ("resized", "<u4", (2,)), ("original", "<u4", (2,)),
    ]
)  # fmt: skip
"""What is compared of an entry; sizes are (width, height). Without a mask file its facts are 0."""


def latent_id(image: PlacedImage) -> int:
    """The id under which the latents of an image are kept."""
    placement, filter_name = image.placement, image.record.subset.resize_interpolation
    return text_id(
        f"{image.record.key}\0{_suffix(placement.bucket, placement.resized, filter_name, mask_source(image))}"
    )


def _suffix(bucket: Size, resized: Size, filter_name: str | None, mask: str | None) -> str:
    extras = f"\0{filter_name or ''}\0{mask or ''}" if filter_name or mask else ""
    return f"{bucket.w}x{bucket.h}\0{resized.w}x{resized.h}{extras}"


def latent_ids(table: ImageTable, rows: np.ndarray) -> np.ndarray:
    """`latent_id` of many rows, uint64."""
    images = table.image_of[rows]
    kinds = np.stack([table.placement_of[rows], table.subset_of[images], table.masks.has_text(images)], axis=1)
    _, first, kind_of = np.unique(_mixed(kinds), return_index=True, return_inverse=True)
    suffixes = [_suffix_of(table, *kinds[index].tolist()) for index in first.tolist()]
    cells = zip(table.keys.cells(images), kind_of.tolist(), strict=True)
    digests = b"".join(blake2b(key + suffixes[kind], digest_size=8).digest() for key, kind in cells)
    return np.frombuffer(digests, dtype="<u8").astype(np.uint64)


def _mixed(kinds: np.ndarray) -> np.ndarray:
    """One number for each row of small numbers, int64 (N,): sorting these is faster than sorting rows."""
    mixed = np.zeros(len(kinds), dtype=np.int64)
    for column in kinds.T:
        mixed = mixed * (int(column.max(initial=0)) + 1) + column
    return mixed


def _suffix_of(table: ImageTable, placement: int, subset: int, has_mask_file: int) -> bytes:
    """What follows the key in the text that an id stands for."""
    place, spec = table.placements[placement], table.subsets[subset]
    mask = "file" if has_mask_file else "alpha" if spec.alpha_mask else None
    return f"\0{_suffix(place.bucket, place.resized, spec.resize_interpolation, mask)}".encode()


def recipe(vae_id: str | None) -> str:
    """What all latents of a shard have in common; None stands for a VAE that nobody noted."""
    return json.dumps({"version": VERSION, "vae": vae_id}, separators=(",", ":"))


def vae_of(recipe_text: str) -> str | None:
    """The VAE of a recipe. Raises ValueError for a recipe of another version."""
    content = json.loads(recipe_text)
    if content["version"] != VERSION:
        raise ValueError(f"version {content['version']}")
    return content["vae"]


class PackedLatentEntries:
    """Entries in a packed store; `positions` are theirs by number, -1 for those that are not there."""

    in_memory = False

    def __init__(self, store: PackedStore, positions: np.ndarray) -> None:
        self._store, self._positions = store, positions
        self._originals = np.zeros((len(positions), 2), dtype=np.uint32)
        there = positions >= 0
        self._originals[there] = store.facts(positions[there])["original"]

    def read(self, number: int) -> LatentEntry:
        """One entry; its latents are views of the file in the dtype of the store and must not be written to."""
        position = int(self._positions[number])
        if position < 0:
            raise KeyError(f"entry {number} is not in the cache")
        return entry_of(self._store.read(position), original=Size(*self._originals[number].tolist()))

    def has(self, numbers: np.ndarray) -> np.ndarray:
        """Which of them are there."""
        return self._positions[numbers] >= 0


def entry_of(arrays: Mapping[str, np.ndarray], *, original: Size) -> LatentEntry:
    """The arrays of a record as an entry; raises KeyError when there are no latents."""
    tensors = {name: as_tensor(array) for name, array in arrays.items()}
    mask = tensors.get("mask")
    return LatentEntry(
        tensors["latents"],
        tensors.get("latents_flipped"),
        original,
        (0.0, 0.0, 0.0, 0.0),
        mask_HW=None if mask is None else mask.float(),
        moments_8hw=tensors.get("moments"),
        flipped_moments_8hw=tensors.get("moments_flipped"),
    )


def as_tensor(array: np.ndarray) -> Tensor:
    """A tensor of the same memory, which is not copied and must not be written to."""
    return torch.from_numpy(array)


with warnings.catch_warnings():
    # Once in a process torch warns of memory that it could write to and must not. Nothing here writes: what is read
    # is copied into a batch.
    warnings.simplefilter("ignore")
    as_tensor(np.frombuffer(b"read-only", np.uint8))


def arrays_of(entry: LatentEntry) -> dict[str, np.ndarray]:
    """What is stored of an entry: float16, or float32 for an entry that goes beyond it."""
    found = {
        "latents": entry.latents_4hw,
        "latents_flipped": entry.flipped_4hw,
        "mask": small_mask(entry),
        "moments": entry.moments_8hw,
        "moments_flipped": entry.flipped_moments_8hw,
    }
    return narrowed({name: tensor for name, tensor in found.items() if tensor is not None})


def narrowed(tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """float16 arrays, or float32 when a value of any of them would become infinite."""
    wide = {name: tensor.detach().to("cpu", torch.float32).numpy() for name, tensor in tensors.items()}
    with np.errstate(over="ignore"):
        halves = {name: array.astype(np.float16) for name, array in wide.items()}
    return halves if all(np.isfinite(half).all() for half in halves.values()) else wide


def facts_of(image: PlacedImage) -> np.ndarray:
    """The facts of an entry that is being made: both files are read for their hashes. Raises OSError."""
    facts = np.zeros((), FACTS)
    record, placement = image.record, image.placement
    for prefix, path in (("", record.path), ("mask_", record.mask)):
        if path is not None:
            stamp = fingerprint.image_stamp(path, with_hash=True)
            facts[f"{prefix}bytes"], facts[f"{prefix}mtime_ns"] = stamp.size, stamp.mtime_ns
            facts[f"{prefix}hash"] = np.frombuffer(bytes.fromhex(stamp.hash or ""), np.uint8)
    facts["bucket"], facts["resized"], facts["original"] = placement.bucket, placement.resized, record.size
    return facts


def stamp_of(facts: np.void, prefix: str = "") -> ImageStamp:
    """The stamp of the image or ("mask_") of the mask that an entry was made from."""
    size, mtime_ns = int(facts[f"{prefix}bytes"]), int(facts[f"{prefix}mtime_ns"])
    return ImageStamp(size, mtime_ns, facts[f"{prefix}hash"].tobytes().hex())
