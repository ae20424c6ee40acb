"""Masks: how much every part of a picture counts in the loss.

Shape letters: B batch, C latent channels, H W pixels, h w latent cells (H/8, W/8).
"""

from __future__ import annotations

import torch
from torch import Tensor

CELL = 8
"""Pixels per latent cell along one side."""


def mask_cells(mask_HW: Tensor) -> Tensor:
    """The mean of a mask over each latent cell: (H, W) -> (h, w), float32. Source: spec conditioning.md section 7.

    Summed in float64, where sums of 64 float32 numbers from 0 to 1 are exact enough not to depend on their order: the
    mirrored mask has mirrored means, bit for bit.
    """
    height, width = mask_HW.shape
    cells = mask_HW.double().reshape(height // CELL, CELL, width // CELL, CELL)
    return cells.mean(dim=(1, 3)).float()


def apply_mask(loss_BChw: Tensor, mask_B1hw: Tensor, *, by_area: bool) -> Tensor:
    """Weight an elementwise loss by a mask in [0, 1]; its mean then counts every cell as its mask says.

    As in sd-scripts a small mask makes a small mean. With `by_area` each row is divided by the mean of its mask, so
    that its mean is that over the masked area alone; a row whose mask is black has no loss. A mask of ones changes no
    bit either way. Source: spec conditioning.md section 7.
    """
    masked_BChw = loss_BChw * mask_B1hw
    if not by_area:
        return masked_BChw
    area_B111 = mask_B1hw.mean(dim=(1, 2, 3), keepdim=True)
    return masked_BChw / torch.where(area_B111 > 0, area_B111, 1.0)
