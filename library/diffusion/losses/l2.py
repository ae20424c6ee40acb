"""Squared error."""

from __future__ import annotations

from torch import Tensor


def elementwise(pred: Tensor, target: Tensor) -> Tensor:
    """Return (pred - target)² per element in float32, same shape."""
    return (pred.float() - target.float()) ** 2
