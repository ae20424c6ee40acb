"""Absolute error."""

from __future__ import annotations

from torch import Tensor


def elementwise(pred: Tensor, target: Tensor) -> Tensor:
    """Return |pred - target| per element in float32, same shape."""
    return (pred.float() - target.float()).abs()
