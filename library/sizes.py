"""Width and height: the only place where their order is decided."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

_HINT = 'write one number or width and height, such as 1024 or "1024,768"'


class Size(NamedTuple):
    """Width and height in pixels (or in latent cells where a name says so)."""

    w: int
    h: int

    @property
    def area(self) -> int:
        """Number of pixels."""
        return self.w * self.h

    @property
    def aspect(self) -> float:
        """Width divided by height."""
        return self.w / self.h

    def __str__(self) -> str:
        return f"{self.w}x{self.h}"


def parse_resolution(value: object) -> Size:
    """Read 512, "512", "512,768" or (512, 768) as a `Size`; one number means a square. Raises ValueError."""
    if isinstance(value, str):
        texts = re.split(r"\s*[,xX]\s*", value.strip())
        if not all(re.fullmatch(r"\d+", text) for text in texts):
            raise ValueError(f"is not a resolution; {_HINT}")
        numbers: list[object] = [int(text) for text in texts]
    elif isinstance(value, Sequence):
        numbers = list(value)
    else:
        numbers = [value]
    if not all(isinstance(n, int) and not isinstance(n, bool) for n in numbers) or len(numbers) not in (1, 2):
        raise ValueError(f"is not a resolution; {_HINT}")
    sides = [n for n in numbers if isinstance(n, int)]
    if min(sides) < 1:
        raise ValueError("has a side below 1 pixel")
    return Size(sides[0], sides[-1])
