"""Small changes of colour as augmentation, as sd-scripts has them (dataset_config.md §9). Needs no torch."""

from __future__ import annotations

import random
from typing import NamedTuple

import cv2
import numpy as np

SHARE = 0.33
"""Of the visits, how many change colours."""

MOST_HUE = 8.0
"""OpenCV's unit, 2 degrees."""

GAMMA = (0.95, 1.05)


class ColourShift(NamedTuple):
    """A turn of the hue in units of 2 degrees, in [-8, 8], or a gamma on values of 0 to 255, in [0.95, 1.05]."""

    hue: float = 0.0
    gamma: float = 1.0


def draw_colours(rng: random.Random) -> ColourShift | None:
    """None for two visits of three; else a turn of the hue or a gamma, with equal chance."""
    if rng.random() > SHARE:
        return None
    if rng.random() > 0.5:
        return ColourShift(hue=rng.uniform(-MOST_HUE, MOST_HUE))
    return ColourShift(gamma=rng.uniform(*GAMMA))


def shift_colours(image: np.ndarray, shift: ColourShift) -> np.ndarray:
    """The changed (H, W, 3) uint8 RGB image.

    The hue turns in OpenCV's HSV, which wraps at 180. The gamma is a power of the values 0 to 255, not of shares, so
    1.05 brightens: 128 becomes 163.
    """
    if shift.hue:
        hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
        hsv[..., 0] = np.mod(hsv[..., 0].astype(np.float64) + shift.hue, 180).astype(np.uint8)
        image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    if shift.gamma != 1.0:
        table = np.clip(np.arange(256, dtype=np.float64) ** shift.gamma, 0, 255).astype(np.uint8)
        image = table[image]
    return image
