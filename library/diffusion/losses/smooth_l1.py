"""Smooth absolute error: d² / c near the target, 2|d| far from it."""

from __future__ import annotations

from torch import Tensor

from library.diffusion.huber import pseudo_huber


def elementwise(pred: Tensor, target: Tensor, threshold_B111: Tensor) -> Tensor:
    """Return 2 * (sqrt(d² + c²) - c) per element in float32, d = pred - target; c broadcasts over each sample."""
    return 2 * pseudo_huber(pred, target, threshold_B111)
