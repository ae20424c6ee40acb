"""Options of networks that act in parts of a picture."""

from __future__ import annotations

from typing import ClassVar

from library.config.fields import GENERATOR, Group, option

MAX_CODES = 7  # colours of three bits, without black


class RegionOptions(Group):
    """How a mask tells the parts of a picture."""

    title: ClassVar[str] = "regional networks"
    acts: ClassVar[frozenset[str]] = GENERATOR

    network_regional_mask_max_color_codes: int | None = option(
        None,
        "the mask has a colour for each network and sub-prompt up to the N-th (red, green, yellow, blue, magenta, "
        "cyan, white, without shades) instead of the brightness of red, green and blue for the first three",
        ge=1,
        le=MAX_CODES,
        zero_is_unset=True,
    )
