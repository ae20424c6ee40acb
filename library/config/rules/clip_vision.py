"""Rules about pictures as prompts."""

from __future__ import annotations

from library.config.fields import GENERATOR
from library.config.rules.rule import conflict, rule
from library.config.run_config import RunConfig
from library.errors import Problem


@rule("clip_vision_strength", "clip_vision_model", "image_path", runs=GENERATOR)
def there_is_a_picture_to_embed(cfg: RunConfig) -> list[Problem]:
    """What is said about embedding pictures needs some, and a strength."""
    options = cfg.clip_vision
    if options.clip_vision_strength is None and cfg.is_given("clip_vision_model"):
        what = "clip_vision_model cannot act without a strength"
        return conflict(cfg, what, "clip_vision_model", fix="set clip_vision_strength, such as 1.0, or remove it")
    if options.clip_vision_strength is not None and not cfg.img2img.image_path:
        what = "clip_vision_strength cannot act: there is no picture to embed"
        return conflict(cfg, what, "clip_vision_strength", fix="name image_path, or remove it")
    return []
