"""Which sub-prompt acts where: masks from the colours of a picture, and what they weigh in the U-Net's layers.

Shape letters: n sub-prompts, H W pixels of the mask picture, h w cells of a layer. Source: gen_img.md section 13.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

EPSILON = 1e-4  # beside the sum of the masks, as in sd-scripts; so 0 where no sub-prompt acts
_CHANNELS = 3


def region_masks(pixels_HW3: Tensor, *, count: int, color_codes: int | None = None) -> Tensor:
    """Masks (n, H, W), float32 in [0, 1], of the first `count` sub-prompts, from a picture's uint8 colours.

    The brightness of red, green and blue is where sub-prompts 0, 1 and 2 act. With color_codes (1 to 7), sub-prompt i
    below it has the pixels whose colour is the number i + 1 in bits: red 1, green 2, blue 4, each 0 or 255. Further
    sub-prompts, and those of which the picture shows nothing, act everywhere.
    """
    masks = []
    for index in range(count):
        if index >= (_CHANNELS if color_codes is None else color_codes):
            mask = torch.ones(pixels_HW3.shape[:2])
        elif color_codes is None:
            mask = pixels_HW3[..., index].float() / 255
        else:
            code = torch.tensor([255 * (index + 1 >> bit & 1) for bit in range(_CHANNELS)], dtype=torch.uint8)
            mask = (pixels_HW3 == code).all(dim=-1).float()
        masks.append(mask if mask.max() > 0 else torch.ones_like(mask))
    return torch.stack(masks)


def in_cells(masks_nHW: Tensor, cells: tuple[int, int]) -> Tensor:
    """Masks (n, h, w) of a layer with (h, w) cells: the mean over each cell, or interpolated where cells are finer."""
    smaller = all(cell <= side for cell, side in zip(cells, masks_nHW.shape[1:], strict=True))
    if smaller:
        return F.interpolate(masks_nHW[None], cells, mode="area")[0]
    return F.interpolate(masks_nHW[None], cells, mode="bilinear", align_corners=False)[0]


def shares(masks_nhw: Tensor) -> Tensor:
    """How much each sub-prompt has of the cross-attention of a cell: m_i / (sum of m + EPSILON), (n, h, w)."""
    return masks_nhw / total(masks_nhw)


def total(masks_nhw: Tensor) -> Tensor:
    """The sum of the masks of a cell and EPSILON, (h, w)."""
    return masks_nhw.sum(dim=0) + EPSILON
