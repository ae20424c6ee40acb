"""What the U-Net is conditioned on besides the latent: text and the six size ids.

Shape letters: B batch, n chunks per caption, L tokens per chunk (77), T text positions (75n + 2), D text width
(2048), P pooled width (1280).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from library.sizes import Size

SizeIds = tuple[int, int, int, int, int, int]


@dataclass(frozen=True, eq=False)
class TextCond:
    """Encoded captions: `hidden_BTD` for cross attention, `pooled_BP` for the added embedding."""

    hidden_BTD: Tensor
    pooled_BP: Tensor

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> TextCond:
        """Return the same rows on another device and/or in another floating dtype."""
        return TextCond(self.hidden_BTD.to(device=device, dtype=dtype), self.pooled_BP.to(device=device, dtype=dtype))

    @staticmethod
    def cat(parts: Sequence[TextCond]) -> TextCond:
        """Join along the batch; every part must have the same T."""
        return TextCond(
            torch.cat([part.hidden_BTD for part in parts]),
            torch.cat([part.pooled_BP for part in parts]),
        )

    def __getitem__(self, rows: slice | Sequence[int] | Tensor) -> TextCond:
        """Select rows of the batch; an integer is refused because it would drop the batch dimension."""
        assert not isinstance(rows, int), "select with a slice or a list, e.g. cond[2:3]"
        return TextCond(self.hidden_BTD[rows], self.pooled_BP[rows])

    def __len__(self) -> int:
        return self.hidden_BTD.shape[0]


@dataclass(frozen=True, eq=False)
class Tokens:
    """Token ids of both tokenizers, (B, n, 77) int64, and per-position weights (B, 75n + 2) float32 or None."""

    ids_1_BnL: Tensor
    ids_2_BnL: Tensor
    weights_1: Tensor | None = None
    weights_2: Tensor | None = None

    def to(self, device: torch.device | str) -> Tokens:
        """Return the same tokens on another device."""
        return Tokens(
            self.ids_1_BnL.to(device),
            self.ids_2_BnL.to(device),
            None if self.weights_1 is None else self.weights_1.to(device),
            None if self.weights_2 is None else self.weights_2.to(device),
        )

    def __len__(self) -> int:
        return self.ids_1_BnL.shape[0]


class CropInfo(NamedTuple):
    """How one training picture was cut: resize `original` to `resized`, cut `target` at (left, top), then mirror.

    `top` and `left` are offsets in pixels of the resized picture, before mirroring.
    """

    original: Size
    top: int
    left: int
    target: Size
    resized: Size
    flipped: bool


def size_ids(crop: CropInfo) -> SizeIds:
    """Return the six size ids (original h, w, crop top, left, target h, w) of the crop that was really made.

    A mirrored sample shows the mirrored picture, so its left offset is what lies left of the crop after mirroring:
    `resized.w - target.w - left`.
    """
    left = crop.resized.w - crop.target.w - crop.left if crop.flipped else crop.left
    return (crop.original.h, crop.original.w, crop.top, left, crop.target.h, crop.target.w)


def legacy_crop_ltrb(bucket: Size, image: Size) -> tuple[float, float, float, float]:
    """Return sd-scripts' `crop_ltrb`: the margins of fitting the picture *into* the bucket, not the crop it makes.

    Left, top, right, bottom in bucket pixels; right and bottom may be fractional. Source: spec bucketing.md §4.
    """
    image_aspect = image.w / image.h
    if bucket.w / bucket.h > image_aspect:
        fitted_w, fitted_h = bucket.h * image_aspect, float(bucket.h)
    else:
        fitted_w, fitted_h = float(bucket.w), bucket.w / image_aspect
    left = (bucket.w - fitted_w) // 2
    top = (bucket.h - fitted_h) // 2
    return (left, top, left + fitted_w, top + fitted_h)


def legacy_size_ids(crop: CropInfo) -> SizeIds:
    """Return the size ids that sd-scripts would give this sample (`--legacy_crop_conditioning`).

    They depend on the original and target sizes and the mirror only, never on where the crop was made.
    """
    left, top, right, _ = legacy_crop_ltrb(crop.target, crop.original)
    if crop.flipped:
        left = crop.target.w - right
    return (crop.original.h, crop.original.w, int(top), int(left), crop.target.h, crop.target.w)
