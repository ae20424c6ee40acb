"""From elementwise losses to the number that is differentiated."""

from __future__ import annotations

from torch import Tensor


def per_sample(loss_BChw: Tensor) -> Tensor:
    """Average an elementwise loss over everything but the batch: (B, ...) -> (B,)."""
    return loss_BChw.flatten(1).mean(dim=1)


def weighted_mean(loss_B: Tensor, weight_B: Tensor, num_real: int) -> Tensor:
    """Sum weight * loss and divide by the number of real rows; padding rows carry weight 0.

    The divisor counts samples, not weights: halving a sample's weight halves its pull, as in sd-scripts.
    A padding row with a non-finite loss does not poison the sum.
    """
    assert num_real >= 1
    weighted_B = (loss_B * weight_B).masked_fill(weight_B == 0, 0.0)
    return weighted_B.sum() / num_real
