"""Pictures that look alike: a perceptual hash, a coarse colour layout, and groups of pictures that agree in both.

The hash is the usual 64-bit pHash: the signs of the 8x8 lowest frequencies of a 32x32 grey picture's cosine transform,
about their median (as in the imagehash package). It survives scaling, compression and small edits. Frequencies say
nothing about colour and little about flat pictures, so the mean colours of an 8x8 grid have to agree as well.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

HASH_BITS = 64
MAX_DISTANCE = 6
"""Bits of 64 in which the hashes of pictures that look alike may differ."""

MAX_COLOUR_DIFFERENCE = 14.0
"""Levels of 255 by which their colours may differ, averaged over the grid."""

GRID = 8
_SIDE = 32


def perceptual_hash(image: np.ndarray) -> int:
    """The 64-bit pHash of an RGB picture, uint8 (H, W, 3)."""
    grey = cv2.resize(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), (_SIDE, _SIDE), interpolation=cv2.INTER_AREA)
    low = cv2.dct(grey.astype(np.float32))[:8, :8]
    bits = np.packbits(low.ravel() > np.median(low))
    return int.from_bytes(bits.tobytes(), "big")


def colour_layout(image: np.ndarray) -> np.ndarray:
    """The mean colours of an 8x8 grid over an RGB picture, uint8 (192,)."""
    return cv2.resize(image, (GRID, GRID), interpolation=cv2.INTER_AREA).ravel()


def groups_alike(hashes: Sequence[int], layouts: np.ndarray) -> list[list[int]]:
    """Groups of two or more pictures that look like the first of their group, each in ascending order.

    `layouts` is uint8 (N, 192). A picture is in one group at most: that of the earliest picture that it looks like.
    One vectorised pass per group and per single picture; a hundred thousand pictures take seconds.
    """
    codes = np.array(hashes, dtype=np.uint64)
    is_free = np.ones(len(codes), dtype=bool)
    groups = []
    for first in range(len(codes)):
        if not is_free[first]:
            continue
        near = np.flatnonzero(np.bitwise_count(codes[first + 1 :] ^ codes[first]) <= MAX_DISTANCE) + first + 1
        near = near[is_free[near]]
        if len(near):
            apart = np.abs(layouts[near].astype(np.int16) - layouts[first].astype(np.int16)).mean(axis=1)
            near = near[apart <= MAX_COLOUR_DIFFERENCE]
        if len(near):
            is_free[near] = False
            groups.append([first, *near.tolist()])
    return groups
