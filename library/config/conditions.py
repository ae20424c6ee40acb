"""The kinds of condition images that tools/make_conditions.py makes, and their settings."""

from __future__ import annotations

from dataclasses import dataclass

KINDS = {
    "canny": "thin edges",
    "soft": "edges by their contrast",
    "grey": "without colour",
    "blur": "without detail",
    "palette": "cells of one colour",
}


@dataclass(frozen=True)
class Settings:
    """low, high: Canny's thresholds, of gradients in levels of 255; an edge begins above high and goes on above low.

    Lengths are shares of the shorter side. blur: standard deviation of the blur. soft: the same for what comes before
    soft edges. cells: how many cells of one colour the shorter side has in a palette.
    """

    low: float = 100.0
    high: float = 200.0
    blur: float = 0.02
    soft: float = 0.004
    cells: int = 16
