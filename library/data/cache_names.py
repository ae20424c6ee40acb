"""Image sizes from the names of latents caches, for images that no index knows yet (cache_formats.md §1)."""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

from library.data.folder_listing import images_among, prefix_of
from library.sizes import Size

_NAME = re.compile(r"(.+)_(\d{4,})x(\d{4,})_sdxl\.npz", re.DOTALL)

_OURS = b"fingerprint_crc.npy"
_END_BYTES = 2048
"""The archive's directory stands at its end; that of six arrays takes 500 bytes."""


def sizes_by_cache(folder: Path, names: Sequence[str], *, listed: Sequence[str]) -> dict[str, Size]:
    """The sizes of those images among `names` that have a latents cache to be trusted; `listed` are all files.

    sd-scripts names its caches after the size before EXIF rotation, so only caches written by this suite count. The
    cache must be newer than the image's last change of any kind (being renamed or copied included), and it must be
    clear which image it belongs to. This reads the end of one small file per image, a tenth of the work of opening
    a picture.
    """
    caches: defaultdict[str, list[re.Match[str]]] = defaultdict(list)
    for file in listed:
        if file.endswith("_sdxl.npz") and (match := _NAME.fullmatch(file)):
            caches[match[1]].append(match)
    if not caches:
        return {}
    num_images = Counter(_stem(image) for image in images_among(listed, hidden=True))
    prefix = prefix_of(folder)
    sizes = {}
    for name in names:
        stem = _stem(name)
        if len(found := caches.get(stem, [])) != 1 or num_images[stem] != 1:
            continue
        size = Size(int(found[0][2]), int(found[0][3]))
        if min(size) > 0 and _is_trusted(prefix + found[0][0], prefix + name):
            sizes[name] = size
    return sizes


def _stem(name: str) -> str:
    return name[: name.rindex(".")]


def _is_trusted(cache: str, image: str) -> bool:
    """Whether this suite wrote the cache file after the image had last been touched."""
    try:
        changed = os.stat(image)
        with open(cache, "rb", buffering=0) as file:
            made = os.fstat(file.fileno())
            if made.st_mtime_ns <= max(changed.st_mtime_ns, changed.st_ctime_ns):
                return False
            file.seek(max(0, made.st_size - _END_BYTES))
            return _OURS in file.read(_END_BYTES)
    except OSError:
        return False
