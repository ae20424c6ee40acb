"""Pseudo-Huber loss: the squared error near the target, linear with slope 2c far from it."""

from __future__ import annotations

from torch import Tensor

from library.diffusion.huber import pseudo_huber


def elementwise(pred: Tensor, target: Tensor, threshold_B111: Tensor) -> Tensor:
    """Return 2c * (sqrt(d² + c²) - c) per element in float32, d = pred - target; c broadcasts over each sample."""
    return 2 * threshold_B111.float() * pseudo_huber(pred, target, threshold_B111)
