"""What becomes of a ControlNet's control image before it is used: `canny`, `canny_63_191`, `none` and so on."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from library.config.conditions import KINDS, Settings

_CANNY = replace(Settings(), low=63.0, high=191.0)  # sd-scripts' thresholds


class Prep(NamedTuple):
    """A kind of condition (of conditions.KINDS) and its settings."""

    kind: str
    settings: Settings


def parse_prep(text: str) -> Prep | None:
    """Read the name of a preparation, None for `none`. Raises ValueError for others, naming those that are known.

    `canny_<low>_<high>` sets the thresholds, `canny_<low>` the first.
    """
    kind, *numbers = text.strip().lower().split("_")
    if kind == "none" and not numbers:
        return None
    if kind not in KINDS or (numbers and kind != "canny") or len(numbers) > 2:
        known = ", ".join(["none", "canny", "canny_<low>_<high>", *(name for name in KINDS if name != "canny")])
        raise ValueError(f'"{text}" is not known; there are {known}')
    if kind != "canny":
        return Prep(kind, Settings())
    if not all(number.isdecimal() and int(number) <= 10000 for number in numbers):
        raise ValueError(f'"{text}" has a threshold that is no whole number, as in canny_63_191')
    low, high = ([float(number) for number in numbers] + [_CANNY.low, _CANNY.high][len(numbers) :])[:2]
    return Prep("canny", replace(_CANNY, low=low, high=high))
