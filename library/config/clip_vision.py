"""Options of pictures that stand in for a prompt's pooled vector."""

from __future__ import annotations

from typing import ClassVar

from library.config.fields import GENERATOR, Group, option

CLIP_VISION_MODEL = "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k"


class ClipVisionOptions(Group):
    """How much a picture that is drawn over says in the place of the prompt."""

    title: ClassVar[str] = "pictures as prompts"
    acts: ClassVar[frozenset[str]] = GENERATOR

    clip_vision_strength: float | None = option(
        None,
        "with image_path: CLIP's embedding of the picture times this takes the place of the prompt's pooled vector "
        "(unset: the prompt's own)",
    )
    clip_vision_model: str = option(
        CLIP_VISION_MODEL, "the CLIP model that embeds it: a folder or a hub id, as safetensors", path=True
    )
