"""The unsharp mask of Gradual Latent, as text: ksize,sigma,strength and perhaps target_x."""

from __future__ import annotations

from typing import NamedTuple


class Unsharp(NamedTuple):
    """x + strength * (x - blurred x), the blur a Gaussian of deviation sigma cells, cut to ksize cells (an odd number).

    target_x: what is sharpened when the size changes is the latents after the step, otherwise those before it.
    """

    ksize: int
    sigma: float
    strength: float
    target_x: bool = True


def parse_unsharp(text: str) -> Unsharp:
    """Read `3,0.5,0.5` or `3,0.5,0.5,0`. Raises ValueError that says what is wrong."""
    parts = [part.strip() for part in text.split(",")]
    if len(parts) not in (3, 4):
        raise ValueError("must be three or four numbers, ksize,sigma,strength[,target_x], such as 3,0.5,0.5")
    try:
        ksize, sigma, strength = int(float(parts[0])), float(parts[1]), float(parts[2])
        target_x = bool(int(parts[3])) if len(parts) == 4 else True
    except (ValueError, OverflowError):
        raise ValueError("must be numbers, ksize,sigma,strength[,target_x], such as 3,0.5,0.5") from None
    if not 3 <= ksize <= 15 or ksize % 2 == 0:
        raise ValueError("must begin with an odd number of cells from 3 to 15")
    if not 0 < sigma <= 100 or not 0 < strength <= 100:
        raise ValueError("must have a sigma and a strength above 0 and not above 100")
    return Unsharp(ksize, sigma, strength, target_x)
