"""Rounding float32 to bfloat16 so that small updates are not lost: up or down by chance, right on average."""

from __future__ import annotations

import torch
from torch import Tensor

_LOW_BITS = 16  # of float32's 23 mantissa bits, those that bfloat16 does not have


def round_stochastically(x: Tensor, generator: torch.Generator) -> Tensor:
    """float32 `x` of any shape as bfloat16, each value one of its two neighbours, E[result] = x.

    The upper neighbour (by magnitude) is taken with a probability that equals the share of the gap that lies below x:
    a uniform 16-bit number is added to the bits of the float32, and the low 16 bits are cut off (Zamirai et al. 2020,
    "Revisiting BFloat16 Training", section 4). Values that bfloat16 holds exactly, infinities and NaN stay what they
    are; a finite value beyond bfloat16's largest becomes that one. `generator` is on the device of x; the pattern
    depends on its seed and the shape alone.
    """
    assert x.dtype == torch.float32, x.dtype
    bits = torch.randint(1 << _LOW_BITS, x.shape, dtype=torch.int32, device=x.device, generator=generator)
    bits += x.contiguous().view(torch.int32)
    bits &= -1 << _LOW_BITS
    largest = torch.finfo(torch.bfloat16).max
    rounded = bits.view(torch.float32).clamp_(-largest, largest).to(torch.bfloat16)
    # Adding to the bits of a NaN can make an infinity of it.
    return torch.where(torch.isfinite(x), rounded, x.to(torch.bfloat16))
