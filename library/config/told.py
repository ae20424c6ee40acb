"""Options of what the model is told beside the words: sizes, crops, and how weighted words are balanced."""

from __future__ import annotations

from typing import ClassVar

from library.config.choices import WEIGHT_BALANCES
from library.config.fields import GENERATOR, Group, option


class ToldOptions(Group):
    """What stands beside a prompt's words, for every picture that says nothing else."""

    title: ClassVar[str] = "what the model is told"
    acts: ClassVar[frozenset[str]] = GENERATOR

    original_width: int | None = option(
        None,
        "width that the model is told the picture had before it was cut (unset: the width; --ow in a prompt)",
        ge=1,
    )
    original_height: int | None = option(None, "the same for the height (unset: H; --oh in a prompt)", ge=1)
    original_width_negative: int | None = option(
        None, "that width for the negative prompt (unset: that of the prompt; --nw in a prompt)", ge=1
    )
    original_height_negative: int | None = option(
        None, "that height for the negative prompt (unset: that of the prompt; --nh in a prompt)", ge=1
    )
    crop_top: int | None = option(
        None, "pixels that the model is told were cut off at the top (unset: 0; --ct in a prompt)"
    )
    crop_left: int | None = option(
        None, "pixels that the model is told were cut off at the left (unset: 0; --cl in a prompt)"
    )
    emb_normalize_mode: str = option(
        "original",
        "what stays as it was when words have weights: the mean of the text's encoding (original), the mean of its "
        "absolute values (abs), or nothing (none)",
        choices=WEIGHT_BALANCES,
    )
