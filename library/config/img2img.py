"""Options of drawing over pictures, and of drawing in two sizes."""

from __future__ import annotations

from typing import ClassVar

from pydantic import field_validator

from library.config.fields import GENERATOR, Group, option
from library.config.key_values import split_pairs


class Img2ImgOptions(Group):
    """What is drawn over, and how much of it stays; the small picture that a large one begins with."""

    title: ClassVar[str] = "pictures that are drawn over"
    acts: ClassVar[frozenset[str]] = GENERATOR

    image_path: str | None = option(
        None,
        "picture to draw over, or a folder of them: one for each picture that is drawn, then from the first again",
        path=True,
    )
    mask_path: str | None = option(
        None, "mask, or a folder of them, taken like image_path: only where it is white is anything drawn", path=True
    )
    strength: float | None = option(
        None, "how much of the picture is drawn anew, 0 to 1: the share of the steps (unset: 0.8)", gt=0, le=1
    )
    use_original_file_name: bool = option(False, "name pictures like those that they are drawn over")
    highres_fix_scale: float | None = option(
        None, "draw a smaller picture first, this many times as large, and over it the whole one", gt=0, lt=1
    )
    highres_fix_steps: int = option(28, "sampling steps of the smaller picture", ge=1, le=1000)
    highres_fix_strength: float | None = option(
        None, "strength with which the smaller picture is drawn over image_path (unset: strength)", gt=0, le=1
    )
    highres_fix_save_1st: bool = option(False, "keep the smaller pictures too")
    highres_fix_latents_upscaling: bool = option(
        False, "enlarge the latents instead of the picture: faster and softer; it needs a strength of 0.7 or so"
    )
    highres_fix_upscaler: str | None = option(
        None, "Python module that enlarges the smaller pictures (see docs/img2img.md; unset: Lanczos' filter)"
    )
    highres_fix_upscaler_args: str | None = option(None, "its arguments: key=value;key=value")
    highres_fix_disable_control_net: bool = option(False, "let control images act on the smaller picture only")

    @field_validator("highres_fix_upscaler_args")
    @classmethod
    def _readable_pairs(cls, value: str | None) -> str | None:
        if value is not None:
            split_pairs(part for part in value.split(";") if part.strip())
        return value
