"""The pixels of a training sample as tensors."""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import Tensor

from library.data.buckets import Placement
from library.data.transforms import apply_crop, apply_crop_to_mask, crop_info
from library.diffusion.crops import CropInfo
from library.sizes import Size


def to_pixels(image: np.ndarray) -> Tensor:
    """(H, W, 3) uint8 -> (3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(image).permute(2, 0, 1).to(torch.float32).div(127.5).sub(1.0)


def to_mask(mask_HW: np.ndarray) -> Tensor:
    """(H, W) uint8 -> (H, W) float32 in [0, 1]."""
    return torch.from_numpy(mask_HW).to(torch.float32).div(255.0)


def cut_mask(mask: np.ndarray, crop: CropInfo, *, interpolation: str | None = None) -> Tensor:
    """The part of a decoded mask that `crop` leaves of its image, float32 (bucket h, bucket w) in [0, 1]."""
    return to_mask(apply_crop_to_mask(mask, crop, interpolation=interpolation))


def cut_control(control: np.ndarray, crop: CropInfo, *, interpolation: str | None = None) -> Tensor:
    """The part of a decoded condition image that `crop` leaves of its image, float32 (3, H, W) in [-1, 1]."""
    return to_pixels(apply_crop(control, crop, interpolation=interpolation))


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
