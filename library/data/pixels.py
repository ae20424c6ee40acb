"""The pixels of a training sample as tensors."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from library.data.transforms import apply_crop, apply_crop_to_mask
from library.diffusion.crops import CropInfo


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
