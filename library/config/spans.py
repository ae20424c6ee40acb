"""A span between two numbers, as `face_crop_aug_range` has it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

_HINT = 'write the low and the high one, such as [2, 4] or "2,4"'


class Span(NamedTuple):
    """Two finite numbers above 0, `low` at most `high`."""

    low: float
    high: float


def parse_span(value: object) -> Span:
    """Read "2,4", [2, 4] or (2.0, 4.0) as a `Span`. Raises ValueError that says what to write."""
    parts: Sequence[object] = ()
    if isinstance(value, str):
        parts = value.split(",")
    elif isinstance(value, Sequence):
        parts = value
    numbers = [_number(part) for part in parts]
    if len(numbers) != 2 or not all(map(math.isfinite, numbers)):
        raise ValueError(f"is not a pair of numbers; {_HINT}")
    low, high = numbers
    if low <= 0 or high <= 0:
        raise ValueError(f"has a number that is not above 0; {_HINT}")
    if low > high:
        raise ValueError(f"has its numbers in the wrong order; {_HINT}")
    return Span(low, high)


def _number(part: object) -> float:
    """The part as a number, NaN when it is none."""
    if isinstance(part, bool) or not isinstance(part, (int, float, str)):
        return math.nan
    try:
        return float(part)
    except (ValueError, OverflowError):
        return math.nan
