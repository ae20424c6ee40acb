"""The noise a sample is diffused with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def sample_noise(generator: torch.Generator, shape: Sequence[int]) -> Tensor:
    """Draw standard normal float32 noise of `shape` on the generator's device.

    Training passes a CPU generator of its own for every sample, so the noise is the same on every device and in
    every batch.
    """
    return torch.randn(tuple(shape), generator=generator, device=generator.device, dtype=torch.float32)
