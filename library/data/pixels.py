"""The pixels of a training sample as tensors."""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import Tensor

from library.data.buckets import Placement
from library.data.transforms import apply_crop, crop_info
from library.diffusion.crops import CropInfo
from library.sizes import Size


def to_pixels(image: np.ndarray) -> Tensor:
    """(H, W, 3) uint8 -> (3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(image).permute(2, 0, 1).to(torch.float32).div(127.5).sub(1.0)


def load_sample(
    image: np.ndarray,
    placement: Placement,
    *,
    flip: bool = False,
    crop_rng: random.Random | None = None,
    interpolation: str | None = None,
    original: Size | None = None,
) -> tuple[Tensor, CropInfo]:
    """Pixels (3, H, W) in [-1, 1] of a decoded image and the record of its crop.

    `crop_rng` draws the crop offset; None crops the centre. `original` is the size of an image that was decoded
    smaller than it is.
    """
    original = original or Size(image.shape[1], image.shape[0])
    crop = crop_info(original, placement, flipped=flip, rng=crop_rng)
    return to_pixels(apply_crop(image, crop, interpolation=interpolation)), crop
