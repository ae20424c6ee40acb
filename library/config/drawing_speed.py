"""Options of picture generation that trade time against memory."""

from __future__ import annotations

from typing import ClassVar

from library.config.fields import GENERATOR, Group, option


class DrawingSpeedOptions(Group):
    """What makes drawing faster, or smaller in memory."""

    title: ClassVar[str] = "speed of generation"
    acts: ClassVar[frozenset[str]] = GENERATOR

    opt_channels_last: bool = option(
        False, "keep the weights of convolutions in the channels-last format, which can be faster in fp16 and bf16"
    )
    compile: bool = option(
        False, "compile the U-Net when it is first called: that takes a minute or more, afterwards steps are faster"
    )
    vae_tiling: bool = option(
        False, "let the VAE work on overlapping tiles of large pictures, which saves memory and changes them slightly"
    )
