"""Options of ControlNets in generation."""

from __future__ import annotations

from typing import ClassVar

from pydantic import field_validator

from library.config.fields import GENERATOR, Group, option
from library.config.preps import parse_prep


class ControlNetOptions(Group):
    """ControlNets, which make pictures follow control images as LLLites do; they share the options of these."""

    title: ClassVar[str] = "ControlNet"
    acts: ClassVar[frozenset[str]] = GENERATOR

    control_net_models: tuple[str, ...] = option(
        (),
        "ControlNets of SDXL: diffusers folders, or safetensors files with names of diffusers or of the original; they "
        "come after control_net_lllite_models in control_net_multipliers, control_net_ratios and guide_image_path",
        path=True,
    )
    control_net_preps: tuple[str, ...] = option(
        (),
        "what becomes of each of their control images first: none, canny, canny_63_191 (the thresholds), soft, grey, "
        "blur or palette (unset: none)",
    )

    @field_validator("control_net_preps")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for text in value:
            parse_prep(text)
        return value
