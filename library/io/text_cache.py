"""Cached text-encoder outputs, one .npz per image in sd-scripts' format, plus what the entry was made from.

Keys: `hidden_state1` (L, 768), `hidden_state2` (L, 1280), `pool2` (1280,), float32 or float16; ours add `fingerprint`
(JSON, 0-d text) and `fingerprint_crc`. Source: spec cache_formats.md §2.

A file may hold several wordings of its caption. The first lies under sd-scripts' keys, where its readers find it; the
others, equal ones once, under `hidden_state1_v1`, `hidden_state2_v1`, `pool2_v1`, then `_v2` and so on. `variant_index`
(int32, one number per wording) says which row a wording is. Each row has keys of its own so that reading one wording
takes as long as from a file with one, its checksum included.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from library.errors import UserError
from library.io import fingerprint as fp
from library.io import npz_file
from library.io.latent_cache import CacheCheck, Status

_CHECKSUMS = "fingerprint_crc"
_DATA_KEYS = ("hidden_state1", "hidden_state2", "pool2")
_INDEX = "variant_index"
_OF_A_VARIANT = re.compile(rf"({'|'.join(_DATA_KEYS)})_v\d+")


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


def write(
    path: str | os.PathLike[str],
    entry: TextEntry,
    fingerprint: str | None,
    *,
    others: Sequence[TextEntry] = (),
    variant_index: Sequence[int] = (),
) -> None:
    """Write the entry atomically; keys of other programs in an existing file stay. float16 stays, bfloat16 widens.

    Without a fingerprint the file says no more of its origin than one of another program does. A file of several
    wordings takes the rows after the first as `others`, and for each wording the number of its row.
    """
    arrays = {key: _storable(getattr(entry, key)) for key in _DATA_KEYS}
    old = {key for key in npz_file.keys_of(path) if key == _INDEX or _OF_A_VARIANT.fullmatch(key)}
    if fingerprint is None:
        assert not variant_index, "nothing says which wordings these are"
        npz_file.write_arrays(path, arrays, drop={"fingerprint", _CHECKSUMS, *old})
        return
    arrays["fingerprint"] = np.array(fingerprint)
    if variant_index:
        assert variant_index[0] == 0 and max(variant_index) == len(others)
        arrays[_INDEX] = np.array(variant_index, dtype=np.int32)
        for row, other in enumerate(others, start=1):
            arrays |= {_row_key(key, row): _storable(getattr(other, key)) for key in _DATA_KEYS}
    npz_file.write_arrays(path, arrays, drop=old, checksum_key=_CHECKSUMS)


def read(path: str | os.PathLike[str], variant: int = 0) -> TextEntry:
    """Read one wording in the dtype it was stored in; raises UserError naming the file when damaged or incomplete."""
    row = _row_of(path, variant) if variant else 0
    keys = [_row_key(key, row) for key in _DATA_KEYS]
    arrays = npz_file.read_entry(path, (*keys, "fingerprint"), required=keys)
    hidden_1, hidden_2, pooled = (torch.from_numpy(arrays[key]) for key in keys)
    made_from = str(arrays["fingerprint"]) if "fingerprint" in arrays else None
    return TextEntry(hidden_1, hidden_2, pooled, made_from)


def check(path: str | os.PathLike[str], expected: str, *, num_tokens: int | None = None) -> Status:
    """Return the status of `inspect` without the reasons."""
    return inspect(path, expected, num_tokens=num_tokens).status


def inspect(
    path: str | os.PathLike[str], expected: str, *, num_tokens: int | None = None, variants: int = 1
) -> CacheCheck:
    """Decide whether a cache file can be used for a caption that should have `expected` as its fingerprint.

    Statuses as for latents. `num_tokens` is L: a file of another length is stale. Files of other programs hold one
    wording, so they are stale when several `variants` are wanted. Never raises for a bad file.
    """
    if not os.path.exists(path):
        return CacheCheck("missing")
    try:
        shapes, checksums, small = npz_file.peek(path, ("fingerprint", _CHECKSUMS, _INDEX))
    except npz_file.BrokenArchive as error:
        return CacheCheck("broken", (str(error),))
    if misfits := _misfits(shapes, num_tokens):
        return CacheCheck("stale", misfits)
    ours = "fingerprint" in small and _CHECKSUMS in small
    if not ours or [checksums[key] for key in _DATA_KEYS] != small[_CHECKSUMS].tolist()[:3]:
        one = ("number of caption variants changed",)
        return CacheCheck("foreign") if variants == 1 else CacheCheck("stale", one)
    reasons = fp.changes(str(small["fingerprint"]), expected)
    if not reasons and variants > 1 and not _has_all_rows(checksums, small):
        reasons = ("caption variants damaged",)
    return CacheCheck("stale", reasons) if reasons else CacheCheck("valid")


def inspect_contents(path: str | os.PathLike[str], *, num_tokens: int, variants: int = 1) -> CacheCheck:
    """Decide whether a cache file holds `variants` wordings of `num_tokens` rows, whatever it was made from.

    Never raises for a bad file.
    """
    if not os.path.exists(path):
        return CacheCheck("missing")
    try:
        shapes, _, small = npz_file.peek(path, (_INDEX,))
    except npz_file.BrokenArchive as error:
        return CacheCheck("broken", (str(error),))
    reasons = _misfits(shapes, num_tokens)
    if not reasons and np.size(small.get(_INDEX, 0)) < variants:
        reasons = ("number of caption variants changed",)
    return CacheCheck("stale", reasons) if reasons else CacheCheck("valid")


def _misfits(shapes: Mapping[str, tuple[int, ...]], num_tokens: int | None) -> tuple[str, ...]:
    """What is wrong with the arrays of the first wording."""
    missing = tuple(f"no {key}" for key in _DATA_KEYS if key not in shapes)
    if missing or num_tokens is None or {shapes[key][:1] for key in _DATA_KEYS[:2]} == {(num_tokens,)}:
        return missing
    return ("max token length changed",)


def _has_all_rows(checksums: Mapping[str, int], small: Mapping[str, np.ndarray]) -> bool:
    """Whether the rows of all wordings are there as they were written."""
    if _INDEX not in small:
        return False
    rows = range(1, int(small[_INDEX].max()) + 1)
    keys = [*_DATA_KEYS, "fingerprint", _INDEX, *(_row_key(key, row) for row in rows for key in _DATA_KEYS)]
    return [checksums.get(key) for key in keys] == small[_CHECKSUMS].tolist()


def _row_key(key: str, row: int) -> str:
    return f"{key}_v{row}" if row else key


def _row_of(path: str | os.PathLike[str], variant: int) -> int:
    index = npz_file.read_entry(path, (_INDEX,), required=(_INDEX,))[_INDEX]
    if variant >= len(index):
        what = f"the cache file holds {len(index)} variants of its caption and not number {variant}"
        raise UserError(what, str(path), "delete it; it will be built again")
    return int(index[variant])


def _storable(values: Tensor | np.ndarray) -> np.ndarray:
    tensor = torch.as_tensor(values).detach().cpu().contiguous()
    return (tensor if tensor.dtype == torch.float16 else tensor.float()).numpy()
