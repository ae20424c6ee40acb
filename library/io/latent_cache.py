"""Cached latents, one .npz per image in sd-scripts' format, plus what the entry was made from.

Keys: `latents` float32 (4, h, w), `latents_flipped` alike (the encoded mirror image, optional), `original_size` int64
[w, h], `crop_ltrb` float64 (4,); ours add `fingerprint` (JSON, 0-d text) and `fingerprint_crc`. Latents are as the VAE
gives them, without the scaling factor. Source: spec cache_formats.md §1.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from library.io import fingerprint as fp
from library.io import npz_file
from library.sizes import Size

Status = Literal["missing", "valid", "stale", "foreign", "broken"]

_CHECKSUMS = "fingerprint_crc"
_DATA_KEYS = ("latents", "original_size", "crop_ltrb", "latents_flipped")


class CacheCheck(NamedTuple):
    """What became of looking at a cache file, and why it cannot be used (in words for the log; empty if it can)."""

    status: Status
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class LatentEntry:
    """One image's latents (4, h, w) float32, unscaled, and those of its mirror image.

    `crop_ltrb` holds sd-scripts' numbers for its own readers (`legacy_crop_ltrb` of bucket and image), never the real
    crop, whoever wrote the file: take that from the placement. `fingerprint` is None in files of other programs.
    """

    latents_4hw: Tensor
    flipped_4hw: Tensor | None
    original: Size
    crop_ltrb: tuple[float, float, float, float]
    fingerprint: str | None = None


def latent_cache_path(image_path: str | os.PathLike[str], original: Size) -> Path:
    """Return where an image's latents lie: `<stem>_WWWWxHHHH_sdxl.npz`, or the older `<stem>.npz` if there is one."""
    stem = os.path.splitext(os.fspath(image_path))[0]
    legacy = Path(stem + ".npz")
    return legacy if legacy.exists() else legacy.with_name(standard_name(image_path, original))


def standard_name(image_path: str | os.PathLike[str], original: Size) -> str:
    """The name of the file that holds an image's latents, without its folder."""
    stem = os.path.splitext(os.path.basename(image_path))[0]
    return f"{stem}_{original.w:04d}x{original.h:04d}_sdxl.npz"


def write(path: str | os.PathLike[str], entry: LatentEntry, fingerprint: str) -> None:
    """Write the entry atomically; keys of other programs in an existing file stay.

    Of an existing file, mirror latents and an alpha mask of another size go when the new entry does not bring them:
    they belonged to the latents being replaced.
    """
    latents = _float32(entry.latents_4hw)
    arrays = {"latents": latents}
    if entry.flipped_4hw is not None:
        arrays["latents_flipped"] = _float32(entry.flipped_4hw)
    arrays["original_size"] = np.array(entry.original, dtype=np.int64)
    arrays["crop_ltrb"] = np.array(entry.crop_ltrb, dtype=np.float64)
    arrays["fingerprint"] = np.array(fingerprint)
    drop = {"latents_flipped"}
    if _alpha_shape(path) != (latents.shape[1] * 8, latents.shape[2] * 8):
        drop.add("alpha_mask")
    npz_file.write_arrays(path, arrays, drop=drop, checksum_key=_CHECKSUMS)


def read(path: str | os.PathLike[str]) -> LatentEntry:
    """Read an entry; raises UserError naming the file when it is damaged or lacks latents."""
    arrays = npz_file.read_entry(path, (*_DATA_KEYS, "fingerprint"), required=_DATA_KEYS[:3])
    flipped = arrays.get("latents_flipped")
    left, top, right, bottom = (float(edge) for edge in arrays["crop_ltrb"])
    width, height = (int(side) for side in arrays["original_size"])
    return LatentEntry(
        latents_4hw=torch.from_numpy(arrays["latents"]).float(),
        flipped_4hw=None if flipped is None else torch.from_numpy(flipped).float(),
        original=Size(width, height),
        crop_ltrb=(left, top, right, bottom),
        fingerprint=str(arrays["fingerprint"]) if "fingerprint" in arrays else None,
    )


def check(
    path: str | os.PathLike[str],
    expected: str,
    *,
    need_flipped: bool,
    latent_hw: tuple[int, int],
    image_path: str | os.PathLike[str] | None = None,
) -> Status:
    """Return the status of `inspect` without the reasons."""
    return inspect(path, expected, need_flipped=need_flipped, latent_hw=latent_hw, image_path=image_path).status


def inspect(
    path: str | os.PathLike[str],
    expected: str,
    *,
    need_flipped: bool,
    latent_hw: tuple[int, int],
    image_path: str | os.PathLike[str] | None = None,
) -> CacheCheck:
    """Decide whether a cache file can be used for an image that should have `expected` as its fingerprint.

    "valid"; "foreign": written by another program, of the right shape, so usable but unproven; "stale": must be
    rebuilt; "broken": unreadable; "missing". Reads the archive's directory and small arrays only. Never raises for a
    bad file. `image_path` allows a touched image to be hashed before its entry counts as stale.
    """
    if not os.path.exists(path):
        return CacheCheck("missing")
    try:
        found = npz_file.peek(path, ("fingerprint", _CHECKSUMS))
    except npz_file.BrokenArchive as error:
        return CacheCheck("broken", (str(error),))
    reasons = _misfits(found.shapes, need_flipped=need_flipped, latent_hw=latent_hw)
    if reasons:
        return CacheCheck("stale", reasons)
    if not _is_ours(found):
        return CacheCheck("foreign")
    reasons = fp.changes(str(found.arrays["fingerprint"]), expected, image_path=image_path)
    return CacheCheck("stale", reasons) if reasons else CacheCheck("valid")


def _misfits(shapes: dict[str, tuple[int, ...]], *, need_flipped: bool, latent_hw: tuple[int, int]) -> tuple[str, ...]:
    reasons = [f"no {key}" for key in _DATA_KEYS[:3] if key not in shapes]
    if need_flipped and "latents_flipped" not in shapes:
        reasons.append("no latents of the mirrored image")
    for key in ("latents", "latents_flipped"):
        shape = shapes.get(key)
        if shape is not None and shape[-2:] != tuple(latent_hw) and (key == "latents" or need_flipped):
            reasons.append("bucket changed")
    return tuple(dict.fromkeys(reasons))


def _is_ours(found: npz_file.Contents) -> bool:
    """Tell whether the fingerprint speaks of the latents in the file.

    sd-scripts keeps our keys when it rewrites latents in place, so the checksums taken at writing must still hold.
    """
    if not {"fingerprint", _CHECKSUMS} <= found.arrays.keys():
        return False
    keys = ["latents"] + (["latents_flipped"] if "latents_flipped" in found.shapes else [])
    return [found.checksums[key] for key in keys] == found.arrays[_CHECKSUMS].tolist()[: len(keys)]


def _alpha_shape(path: str | os.PathLike[str]) -> tuple[int, ...] | None:
    try:
        return npz_file.peek(path).shapes.get("alpha_mask")
    except npz_file.BrokenArchive:
        return None


def _float32(latents: Tensor | np.ndarray) -> np.ndarray:
    return torch.as_tensor(latents).detach().to("cpu", torch.float32).contiguous().numpy()
