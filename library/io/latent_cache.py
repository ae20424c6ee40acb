"""Cached latents, one .npz per image in sd-scripts' format, plus what the entry was made from.

Keys: `latents` float32 (4, h, w), `latents_flipped` alike (the encoded mirror image, optional), `alpha_mask` float32
(8h, 8w) in [0, 1] (the loss mask, optional), `original_size` int64 [w, h], `crop_ltrb` float64 (4,); ours add
`fingerprint` (JSON, 0-d text) and `fingerprint_crc`, and where they are wanted `moments` and `moments_flipped`, float32
(8, h, w): the posterior's mean and log-variance. Latents are as the VAE gives them, without the scaling factor.
Source: spec cache_formats.md §1. sd-scripts writes masks from alpha only; ours from mask files too.
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
_MASK = "alpha_mask"

CELL = 8
"""Pixels per latent cell along one side."""

MaskSource = Literal["alpha", "file"]
"""What a mask is made from: the image's own alpha, or a mask file."""
_MOMENT_KEYS = ("moments", "moments_flipped")


class CacheCheck(NamedTuple):
    """What became of looking at a cache file, and why it cannot be used (in words for the log; empty if it can)."""

    status: Status
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class LatentEntry:
    """One image's latents (4, h, w) float32, unscaled, and those of its mirror image; and its loss mask.

    `mask_HW` is float32 in [0, 1], in pixels (8h, 8w) or already per latent cell (h, w), not mirrored. Where they are
    wanted, there are also the posteriors' moments, float32 (8, h, w): mean, then log-variance.

    `crop_ltrb` holds sd-scripts' numbers for its own readers (`legacy_crop_ltrb` of bucket and image), never the real
    crop, whoever wrote the file: take that from the placement. `fingerprint` is None in files of other programs.
    """

    latents_4hw: Tensor
    flipped_4hw: Tensor | None
    original: Size
    crop_ltrb: tuple[float, float, float, float]
    fingerprint: str | None = None
    mask_HW: Tensor | None = None
    moments_8hw: Tensor | None = None
    flipped_moments_8hw: Tensor | None = None


def latent_cache_path(image_path: str | os.PathLike[str], original: Size) -> Path:
    """Return where an image's latents lie: `<stem>_WWWWxHHHH_sdxl.npz`, or the older `<stem>.npz` if there is one."""
    stem = os.path.splitext(os.fspath(image_path))[0]
    legacy = Path(stem + ".npz")
    return legacy if legacy.exists() else legacy.with_name(standard_name(image_path, original))


def standard_name(image_path: str | os.PathLike[str], original: Size) -> str:
    """The name of the file that holds an image's latents, without its folder."""
    stem = os.path.splitext(os.path.basename(image_path))[0]
    return f"{stem}_{original.w:04d}x{original.h:04d}_sdxl.npz"


def write(path: str | os.PathLike[str], entry: LatentEntry, fingerprint: str | None) -> None:
    """Write the entry atomically; keys of other programs in an existing file stay.

    Without a fingerprint the file says no more of its origin than one of another program does.

    Of an existing file, mirror latents, moments and a mask go when the new entry does not bring them: they belonged to
    the latents being replaced.
    """
    latents = _float32(entry.latents_4hw)
    arrays = {"latents": latents}
    if entry.flipped_4hw is not None:
        arrays["latents_flipped"] = _float32(entry.flipped_4hw)
    if entry.mask_HW is not None:
        arrays[_MASK] = _pixels(_float32(entry.mask_HW), latents.shape)
    arrays["original_size"] = np.array(entry.original, dtype=np.int64)
    arrays["crop_ltrb"] = np.array(entry.crop_ltrb, dtype=np.float64)
    drop = {"latents_flipped", _MASK, *_MOMENT_KEYS}
    if fingerprint is None:
        npz_file.write_arrays(path, arrays, drop=drop | {"fingerprint", _CHECKSUMS})
        return
    arrays["fingerprint"] = np.array(fingerprint)
    for key, moments in zip(_MOMENT_KEYS, (entry.moments_8hw, entry.flipped_moments_8hw), strict=True):
        if moments is not None:
            arrays[key] = _float32(moments)
    npz_file.write_arrays(path, arrays, drop=drop, checksum_key=_CHECKSUMS)


def read(path: str | os.PathLike[str], *, with_mask: bool = True, moments: bool = False) -> LatentEntry:
    """Read an entry, its mask and its moments only when asked.

    Raises UserError naming the file when it is damaged or lacks latents, or moments that were asked for.
    """
    extras = (*((_MASK,) if with_mask else ()), *(_MOMENT_KEYS if moments else ()))
    keys = (*_DATA_KEYS, "fingerprint", *extras)
    arrays = npz_file.read_entry(path, keys, required=_DATA_KEYS[:3] + _MOMENT_KEYS[:moments])
    mask = arrays.get(_MASK)
    flipped = arrays.get("latents_flipped")
    left, top, right, bottom = (float(edge) for edge in arrays["crop_ltrb"])
    width, height = (int(side) for side in arrays["original_size"])
    return LatentEntry(
        latents_4hw=torch.from_numpy(arrays["latents"]).float(),
        flipped_4hw=None if flipped is None else torch.from_numpy(flipped).float(),
        original=Size(width, height),
        crop_ltrb=(left, top, right, bottom),
        fingerprint=str(arrays["fingerprint"]) if "fingerprint" in arrays else None,
        mask_HW=_tensor(mask),
        moments_8hw=_tensor(arrays.get("moments")),
        flipped_moments_8hw=_tensor(arrays.get("moments_flipped")),
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
    need_moments: bool = False,
    image_path: str | os.PathLike[str] | None = None,
    mask: MaskSource | None = None,
    mask_path: str | os.PathLike[str] | None = None,
) -> CacheCheck:
    """Decide whether a cache file can be used for an image that should have `expected` as its fingerprint.

    "valid"; "foreign": written by another program, of the right shape, so usable but unproven; "stale": must be
    rebuilt; "broken": unreadable; "missing". Reads the archive's directory and small arrays only. Never raises for a
    bad file. `image_path` and `mask_path` allow a touched file to be hashed before its entry counts as stale. `mask`
    says what mask the entry has to hold; one that is not wanted does no harm.
    """
    if not os.path.exists(path):
        return CacheCheck("missing")
    try:
        found = npz_file.peek(path, ("fingerprint", _CHECKSUMS))
    except npz_file.BrokenArchive as error:
        return CacheCheck("broken", (str(error),))
    reasons = _misfits(found.shapes, need_flipped=need_flipped, latent_hw=latent_hw, need_mask=mask is not None)
    if need_moments:
        reasons += _lacking_moments(found.shapes, need_flipped=need_flipped, latent_hw=latent_hw)
    if reasons:
        return CacheCheck("stale", reasons)
    if not _is_ours(found, with_mask=mask is not None):
        # The masks of other programs are made from alpha; when they rewrite latents they leave our keys as they are.
        if mask == "file" or need_moments:
            return CacheCheck("stale", ("mask of another program" if mask == "file" else "latents of another program",))
        return CacheCheck("foreign")
    reasons = fp.changes(str(found.arrays["fingerprint"]), expected, image_path=image_path, mask_path=mask_path)
    return CacheCheck("stale", reasons) if reasons else CacheCheck("valid")


def inspect_contents(
    path: str | os.PathLike[str],
    *,
    need_flipped: bool,
    latent_hw: tuple[int, int],
    need_moments: bool = False,
    need_mask: bool = False,
) -> CacheCheck:
    """Decide as `inspect` does whether a file holds what is needed, in the right shapes, whatever it was made from."""
    if not os.path.exists(path):
        return CacheCheck("missing")
    try:
        shapes = npz_file.peek(path).shapes
    except npz_file.BrokenArchive as error:
        return CacheCheck("broken", (str(error),))
    reasons = _misfits(shapes, need_flipped=need_flipped, latent_hw=latent_hw, need_mask=need_mask)
    if need_moments:
        reasons += _lacking_moments(shapes, need_flipped=need_flipped, latent_hw=latent_hw)
    return CacheCheck("stale", reasons) if reasons else CacheCheck("valid")


def _lacking_moments(
    shapes: dict[str, tuple[int, ...]], *, need_flipped: bool, latent_hw: tuple[int, int]
) -> tuple[str, ...]:
    wanted = _MOMENT_KEYS if need_flipped else _MOMENT_KEYS[:1]
    is_lacking = any(shapes.get(key, ())[-2:] != tuple(latent_hw) for key in wanted)
    return ("no mean and variance",) if is_lacking else ()


def _misfits(
    shapes: dict[str, tuple[int, ...]], *, need_flipped: bool, latent_hw: tuple[int, int], need_mask: bool
) -> tuple[str, ...]:
    reasons = [f"no {key}" for key in _DATA_KEYS[:3] if key not in shapes]
    if need_flipped and "latents_flipped" not in shapes:
        reasons.append("no latents of the mirrored image")
    for key in ("latents", "latents_flipped"):
        shape = shapes.get(key)
        if shape is not None and shape[-2:] != tuple(latent_hw) and (key == "latents" or need_flipped):
            reasons.append("bucket changed")
    if need_mask and _MASK not in shapes:
        reasons.append("no mask")
    elif need_mask and shapes[_MASK] != (latent_hw[0] * CELL, latent_hw[1] * CELL):
        reasons.append("bucket changed")
    return tuple(dict.fromkeys(reasons))


def _is_ours(found: npz_file.Contents, *, with_mask: bool) -> bool:
    """Tell whether the fingerprint speaks of the latents (and the mask, if it matters) in the file.

    sd-scripts keeps our keys when it rewrites latents in place, so the checksums taken at writing must still hold.
    """
    if not {"fingerprint", _CHECKSUMS} <= found.arrays.keys():
        return False
    keys = [key for key in ("latents", "latents_flipped", _MASK) if key in found.shapes and (key != _MASK or with_mask)]
    return [found.checksums[key] for key in keys] == found.arrays[_CHECKSUMS].tolist()[: len(keys)]


def _pixels(mask: np.ndarray, latents_shape: tuple[int, ...]) -> np.ndarray:
    """The mask in pixels, as sd-scripts stores it."""
    return mask.repeat(CELL, 0).repeat(CELL, 1) if mask.shape == latents_shape[1:] else mask


def _tensor(array: np.ndarray | None) -> Tensor | None:
    return None if array is None else torch.from_numpy(array).float()


def _float32(latents: Tensor | np.ndarray) -> np.ndarray:
    return torch.as_tensor(latents).detach().to("cpu", torch.float32).contiguous().numpy()
