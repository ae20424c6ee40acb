"""Cached text-encoder outputs, one .npz per image in sd-scripts' format, plus what the entry was made from.

Keys: `hidden_state1` (L, 768), `hidden_state2` (L, 1280), `pool2` (1280,), float32 or float16; ours add `fingerprint`
(JSON, 0-d text) and `fingerprint_crc`. Source: spec cache_formats.md §2.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from library.io import fingerprint as fp
from library.io import npz_file
from library.io.latent_cache import CacheCheck, Status

_CHECKSUMS = "fingerprint_crc"
_DATA_KEYS = ("hidden_state1", "hidden_state2", "pool2")


@dataclass(frozen=True, eq=False)
class TextEntry:
    """One caption's encoder outputs: hidden states (L, width), L = 75n + 2, and the pooled vector (width,)."""

    hidden_state1: Tensor
    hidden_state2: Tensor
    pool2: Tensor
    fingerprint: str | None = None


def text_cache_path(image_path: str | os.PathLike[str]) -> Path:
    """Return where the encoded caption of an image lies: `<stem>_te_outputs.npz`."""
    return Path(os.path.splitext(os.fspath(image_path))[0] + "_te_outputs.npz")


def write(path: str | os.PathLike[str], entry: TextEntry, fingerprint: str | None) -> None:
    """Write the entry atomically; keys of other programs in an existing file stay. float16 stays, bfloat16 widens.

    Without a fingerprint the file says no more of its origin than one of another program does.
    """
    arrays = {key: _storable(getattr(entry, key)) for key in _DATA_KEYS}
    if fingerprint is None:
        npz_file.write_arrays(path, arrays, drop={"fingerprint", _CHECKSUMS})
        return
    arrays["fingerprint"] = np.array(fingerprint)
    npz_file.write_arrays(path, arrays, checksum_key=_CHECKSUMS)


def read(path: str | os.PathLike[str]) -> TextEntry:
    """Read an entry in the dtype it was stored in; raises UserError naming the file when damaged or incomplete."""
    arrays = npz_file.read_entry(path, (*_DATA_KEYS, "fingerprint"), required=_DATA_KEYS)
    return TextEntry(
        hidden_state1=torch.from_numpy(arrays["hidden_state1"]),
        hidden_state2=torch.from_numpy(arrays["hidden_state2"]),
        pool2=torch.from_numpy(arrays["pool2"]),
        fingerprint=str(arrays["fingerprint"]) if "fingerprint" in arrays else None,
    )


def check(path: str | os.PathLike[str], expected: str, *, num_tokens: int | None = None) -> Status:
    """Return the status of `inspect` without the reasons."""
    return inspect(path, expected, num_tokens=num_tokens).status


def inspect(path: str | os.PathLike[str], expected: str, *, num_tokens: int | None = None) -> CacheCheck:
    """Decide whether a cache file can be used for a caption that should have `expected` as its fingerprint.

    Statuses as for latents. `num_tokens` is L: a file of another length is stale. Never raises for a bad file.
    """
    if not os.path.exists(path):
        return CacheCheck("missing")
    try:
        shapes, checksums, small = npz_file.peek(path, ("fingerprint", _CHECKSUMS))
    except npz_file.BrokenArchive as error:
        return CacheCheck("broken", (str(error),))
    missing = tuple(f"no {key}" for key in _DATA_KEYS if key not in shapes)
    if missing:
        return CacheCheck("stale", missing)
    if num_tokens is not None and {shapes[key][:1] for key in _DATA_KEYS[:2]} != {(num_tokens,)}:
        return CacheCheck("stale", ("max token length changed",))
    ours = "fingerprint" in small and _CHECKSUMS in small
    if not ours or [checksums[key] for key in _DATA_KEYS] != small[_CHECKSUMS].tolist()[:3]:
        return CacheCheck("foreign")
    reasons = fp.changes(str(small["fingerprint"]), expected)
    return CacheCheck("stale", reasons) if reasons else CacheCheck("valid")


def _storable(values: Tensor | np.ndarray) -> np.ndarray:
    tensor = torch.as_tensor(values).detach().cpu().contiguous()
    return (tensor if tensor.dtype == torch.float16 else tensor.float()).numpy()
